"""History of a run: lines that were cut short, separators in texts, lost settings."""

import dataclasses

from oreal_jax import config as configuration
from oreal_jax.config import TrainConfig
from oreal_jax.losses import BestOfNCloning, Oreal
from oreal_jax.train.history import (
    Change,
    read_history,
    record_end,
    record_start,
    setting_changes,
)


def test_texts_with_separators_and_a_line_cut_short_lose_nothing(tmp_path):
    record_start(tmp_path, 0, {"system_prompt": Change("a", "b\u2028c")})
    with (tmp_path / "history.jsonl").open("ab") as file:
        file.write('{"event": "é'.encode()[:-1])  # by a full disk
    record_start(tmp_path, 3, {})
    record_end(tmp_path, 5, "finished")
    events = [row["event"] for row in read_history(tmp_path)]
    assert events == ["start", "start", "end"]


def test_settings_of_a_replaced_loss_are_changes():
    loss = Oreal(kl_weight=0.5)
    first = TrainConfig(model="m", prompts="p", loss=loss)
    second = dataclasses.replace(first, loss=BestOfNCloning())
    changes = setting_changes(configuration.as_json(first), second)
    assert changes["loss.kl_weight"] == Change(0.5, None)
