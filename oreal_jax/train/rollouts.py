"""Rollouts: the verified completions of a step's prompts, from all processes."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from oreal_jax import distributed
from oreal_jax.config import TrainConfig
from oreal_jax.console import Screen
from oreal_jax.data import Chat, Prompt, PromptOrder
from oreal_jax.errors import Failure
from oreal_jax.files import write_lines
from oreal_jax.model import Params
from oreal_jax.sampling import Completion, Engine, Request, Statistics
from oreal_jax.train.run_directory import interrupted_path
from oreal_jax.trajectory import Group, Trajectory
from oreal_jax.verify import Candidate, Pool, Verdict
from oreal_jax.verify.completions import verify_completions
from oreal_jax.verify.llm_judge import Judge, judge_metrics

Verified = list[tuple[Completion, Verdict]]  # of one prompt


class StepPrompt(NamedTuple):
    """A prompt of a step.

    `group` is its index in the step, `first_sample` the run-wide index of its first
    sample.
    """

    prompt: Prompt
    group: int
    tokens: list[int]
    first_sample: int


def step_prompts(
    config: TrainConfig, chat: Chat, order: PromptOrder, data_position: int
) -> list[StepPrompt]:
    """Return the prompts of the next step, after `data_position` prompts were used."""
    return [
        StepPrompt(
            prompt,
            group,
            chat.encode(prompt.question),
            occurrence * config.samples_per_prompt,
        )
        for group, (prompt, occurrence) in enumerate(order.batch(data_position))
    ]


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Generates completions with the current policy and verifies them.

    Each process handles its share of the prompts; `all_trajectories` then gathers the
    trajectories in every process.
    """

    config: TrainConfig
    run: Path
    screen: Screen
    chat: Chat
    engine: Engine
    pool: Pool
    judge: Judge | None

    def __call__(
        self, policy: Params, prompts: Sequence[StepPrompt], step: int
    ) -> list[Verified]:
        """Return K verified completions of each of this process's prompts.

        If interrupted, writes the finished completions to RUN/interrupted; on resuming,
        the step is rerun and generates the same completions.
        """
        completions: dict[tuple[int, int], Completion] = {}
        try:
            self._generate(policy, prompts, step, completions)
            verdicts = self._verify(prompts, completions, step)
        except KeyboardInterrupt:
            if completions:
                self._save_interrupted(prompts, completions, step)
            raise
        samples = range(self.config.samples_per_prompt)
        return [
            [(completions[n, k], verdicts[n, k]) for k in samples]
            for n in range(len(prompts))
        ]

    def _generate(
        self,
        policy: Params,
        prompts: Sequence[StepPrompt],
        step: int,
        completions: dict[tuple[int, int], Completion],
    ) -> None:
        """Add K completions of each prompt to `completions`, by prompt and sample.

        Finished ones are verified while others are generated.
        """

        def finish(n: int, k: int, completion: Completion) -> None:
            text = self.chat.decode(completion.tokens)
            completions[n, k] = completion._replace(text=text)
            if completion.finish_reason == "stop":
                # Starts verification now; `_verify` gets the cached verdict.
                prompt = prompts[n].prompt
                self.pool.submit(text, prompt.gold_answer, prompt.as_json())

        config, samples = self.config, self.config.samples_per_prompt
        with distributed.enter_together():
            weights = self.engine.weights(policy)
        requests = [
            Request(
                each.tokens,
                config.sampling,
                each.prompt.key,
                each.first_sample,
                config.seed,
            )
            for each in prompts
        ]
        label, total = f"step {step}: ", len(prompts) * samples
        with self.screen.phase("gen", total=total, label=label) as advance:
            try:
                self.engine.sample(
                    weights,
                    requests,
                    samples,
                    step=step,
                    renormalise=config.log_probs == "sampled",
                    on_progress=lambda tokens, finished: advance(finished, tokens),
                    on_finished=finish,
                )
            except Failure as error:
                raise type(error)(f"{label}{error}; the step is not saved") from None

    def _verify(
        self,
        prompts: Sequence[StepPrompt],
        completions: Mapping[tuple[int, int], Completion],
        step: int,
    ) -> dict[tuple[int, int], Verdict]:
        label, total = f"step {step}: ", len(completions)
        order = sorted(completions)
        with self.screen.phase("verify", total=total, label=label) as advance:
            candidates = [
                Candidate(
                    prompts[n].prompt.question,
                    prompts[n].prompt.gold_answer,
                    completions[n, k].text,
                    completions[n, k].finish_reason,
                    prompts[n].prompt.as_json(),
                )
                for n, k in order
            ]
            verdicts = verify_completions(candidates, self.pool, self.judge, advance)
        return dict(zip(order, verdicts, strict=True))

    def _save_interrupted(
        self,
        prompts: Sequence[StepPrompt],
        completions: Mapping[tuple[int, int], Completion],
        step: int,
    ) -> None:
        rows = [
            {
                "step": step,
                "id": prompts[n].prompt.id,
                "group": prompts[n].group,
                "sample": prompts[n].first_sample + k,
                "question": prompts[n].prompt.question,
                "gold_answer": prompts[n].prompt.gold_answer,
                "completion": completion.text,
                "tokens": len(completion.tokens),
                "finish_reason": completion.finish_reason,
            }
            for (n, k), completion in sorted(completions.items(), key=lambda x: x[0])
        ]
        path = interrupted_path(self.run, step, distributed.process_index())
        write_lines(path, rows)
        total = len(prompts) * self.config.samples_per_prompt
        self.screen.log(f"saved {len(rows)} of {total} completions to {path}")

    def metrics(self) -> dict[str, float]:
        """Return engine throughput and judge counters of this step.

        They are summed over all processes.
        """
        judge = self.judge
        parts = distributed.gather_values(
            [self.engine.statistics, judge and judge.take_counts()]
        )
        engines = [Statistics(*statistics) for statistics, _ in parts]
        values = Statistics.combine(engines).metrics()
        return values | (
            judge_metrics([counts for _, counts in parts]) if judge else {}
        )


def all_trajectories(
    prompts: Sequence[StepPrompt], local: Sequence[Verified]
) -> list[Group]:
    """Gather the trajectories of all processes, without advantages.

    `local` holds the completions of this process's share of `prompts`.
    """
    groups = distributed.gather_shares(list(local), encode, decode)
    return [
        [
            Trajectory(
                prompt=each.prompt,
                group=each.group,
                sample=each.first_sample + k,
                prompt_tokens=each.tokens,
                completion=completion,
                verdict=verdict,
            )
            for k, (completion, verdict) in enumerate(group)
        ]
        for each, group in zip(prompts, groups, strict=True)
    ]


def encode(groups: Sequence[Verified]) -> bytes:
    """Return verified completions as bytes; `decode` is the exact inverse."""

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return {"dtype": value.dtype.str, "data": value.tobytes()}
        raise TypeError(type(value))

    rows = [
        [(tuple(c), dataclasses.astuple(verdict)) for c, verdict in group]
        for group in groups
    ]
    # Decoded text may contain an unpaired surrogate.
    packer = msgpack.Packer(default=plain, unicode_errors="surrogatepass")
    return packer.pack(rows)


def decode(encoded: bytes) -> list[Verified]:
    """Return the verified completions that `encode` serialised."""

    def array(value: dict[str, Any]) -> np.ndarray:
        return np.frombuffer(value["data"], value["dtype"])

    rows = msgpack.unpackb(encoded, object_hook=array, unicode_errors="surrogatepass")
    return [
        [(Completion(*completion), Verdict(*verdict)) for completion, verdict in group]
        for group in rows
    ]
