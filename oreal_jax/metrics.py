"""Metrics of a run: their table, and a JSON object per step."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import NamedTuple

import jax

from oreal_jax.files import write_text


class Metric(NamedTuple):
    """A row of the table of metrics: `{a,b}` in a name stands for two metrics."""

    name: str
    unit: str
    meaning: str
    healthy: str

    @property
    def names(self) -> list[str]:
        """The names in full."""
        start, _, alternatives = self.name.partition("{")
        alternatives, _, end = alternatives.partition("}")
        return [f"{start}{each}{end}" for each in alternatives.split(",")]


# Of `metrics.jsonl`, without those of a user's own loss: name, unit, meaning, and,
# except for plain counts, the values in a run that learns.
_ROWS = """
step | | index of the step, from 0 |
critic/score/mean | share | correct completions | rises
reward | -1 to 1 | mean reward, +1 correct and -1 otherwise | rises
reward_std | reward | standard deviation within a prompt's group, mean over prompts |
    above 0; falls when prompts become too easy
frac_reward_zero_std | share | prompts whose samples are all correct or all incorrect;
    they train nothing | well below 1; otherwise choose prompts by pass rate
response_length/{mean,max} | tokens | length of completions | no drift to max_tokens, no
    collapse
response_length/clip_ratio | share | completions cut at max_tokens, which count as
    incorrect | low and falling; otherwise raise sampling.max_tokens
rollout/negative_log_prob | nats per token | mean -log pi of sampled tokens at
    temperature 1 | falls slowly; near 0 the policy no longer explores
rollout/occupancy | share | decode slots in use while requests were waiting | near 1
rollout/swapped_rows | sequences | moved to host memory because the cache was full | 0,
    or few; otherwise raise cache_tokens
verdict/{correct,incorrect} | completions | by outcome |
verdict/undecided | completions | verified neither correct nor incorrect | below a few
    percent; otherwise use a judge
verdict/by_{rule,judge,truncated,timeout,crash} | completions | by origin of the
    verdict; truncated: no stop token; judge: only with one | by_timeout and by_crash
    near 0
verdict/by_VERIFIER | completions | by a verifier of your own, VERIFIER being the name
    of its function |
oreal/kept | completions | selected for the update | above 0; a step without any changes
    no weights
oreal/kept_correct | completions | correct ones of these | half
oreal/omega_{correct,incorrect}/mean | 0 to 1 | mean token weight of correct or
    incorrect completions (OREAL) | 0 at first, above 0 once the token reward model has
    learned
oreal/omega_zero_share | share | tokens with weight 0 (OREAL) | 1 at first, then below 1
actor/loss | | loss of the policy, all terms | finite
actor/pg_loss | | its terms other than KL and entropy | finite
actor/{positive,negative}_loss | | term of correct or incorrect completions (OREAL) |
    finite
actor/kl_loss | nats per token | KL from the policy to the reference, before its weight
    | 0 at first, grows slowly
actor/entropy | nats per token | entropy of the policy on selected tokens | falls
    slowly; near 0 the policy no longer explores
actor/grad_norm | | gradient norm of the policy before clipping; 0 while it is frozen |
    no jumps of orders of magnitude
actor/lr | | learning rate of the policy | as configured
training/rollout_probs_diff_{mean,max} | probability | difference of a token's
    probability between sampler and trainer | far below max_disagreement; 0.0001 or less
    in float32
training/rollout_probs_correlation | -1 to 1 | correlation of these probabilities |
    above 0.99
token_reward/loss | nats per completion | cross-entropy of the token reward model | 0.69
    at first, falls
token_reward/accuracy | share | completions whose outcome it predicts | 0.5 at first,
    rises
token_reward/auc | 0 to 1 | probability that it scores a correct completion above an
    incorrect one | 0.5 at first, rises
token_reward/grad_norm | | its gradient norm before clipping | no jumps of orders of
    magnitude
token_reward/lr | | its learning rate | as configured
judge/asked | completions | sent to the LLM judge (only with one): the sum of the next
    four | a small part of all completions
judge/{correct,incorrect,undecided} | completions | by its verdict |
judge/left_to_rule | completions | decided by rule because no host replied | 0
judge/disagrees_with_rule | completions | incorrect by rule, correct by the judge | few;
    read some of them
judge/failed_{timeout,connection,status,garbage,cut_short,no_verdict,closed} | requests
    | failed requests by reason | near 0
judge/retries | requests | repeated requests | near 0
judge/taken_{out,back} | hosts | taken out of use, or back into use | 0
judge/hosts_up | hosts | in use at the end of the step | all of them
judge/{prompt,completion}_tokens | tokens | read and written by it |
judge/latency/{mean,max} | seconds | per reply | below judge_timeout
timing_s/{gen,verify,ref,update_actor,write} | seconds | phases: generation,
    verification, reference log-probabilities, update, trajectories | verify and write
    are small parts
timing_s/{load,restore,testing,save} | seconds | phases of some steps: weights read, run
    resumed, evaluation, checkpoint (recorded with the next step) |
perf/time_per_step | seconds | a step without its evaluation | constant
perf/total_num_tokens | tokens | prompts and completions of a step |
perf/throughput | tokens/s per device | these over the step | constant
perf/{gen,ref,actor}_throughput | tokens/s | tokens of a phase over its seconds, all
    devices | constant
perf/{prefill,decode}_throughput | tokens/s | of the engines, all devices | constant;
    decoding speeds up with more slots
perf/tflops/{gen,ref,actor} | TFLOP/s per device | useful matrix products: no padding,
    no rematerialisation | constant
perf/mfu/{gen,ref,actor} | share | these over the device's bfloat16 peak (TPUs and known
    GPUs) | actor 0.3 to 0.5; gen far less, as memory limits decoding
perf/compilations | programs | compiled, not loaded | 0 after the first step
perf/compile_seconds | seconds | tracing, lowering, compiling and loading programs | 0
    after the first step
"""
METRICS = tuple(
    Metric(*(" ".join(cell.split()) for cell in row.split("|")))
    for row in re.split(r"\n(?=\S)", _ROWS.strip())
)


class MetricsLog:
    """The open `metrics.jsonl` of a run; repeated steps replace their old lines."""

    def __init__(self, run: Path, start: int):
        """Open the file of `run` and remove its lines from step `start` on."""
        self._path = run / "metrics.jsonl"
        if self._path.exists():
            rows = [row for row in read(self._path, step=int) if row["step"] < start]
            write_text(self._path, "".join(map(_line, rows)))
        self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step to disk."""
        self._file.write(_line({"step": step} | dict(metrics)))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Compilations:
    """A counter of compiled programs and of seconds to trace, compile and load them."""

    TRACED = "/jax/core/compile/jaxpr_trace_duration"
    LOWERED = "/jax/core/compile/jaxpr_to_mlir_module_duration"
    # JAX also reports this for loaded programs, after `LOADED`.
    COMPILED = "/jax/core/compile/backend_compile_duration"
    LOADED = "/jax/compilation_cache/cache_hits"
    SAVED = "/jax/compilation_cache/compile_time_saved_sec"

    def __init__(self):
        self._count, self._seconds = 0, 0.0
        self.saved_seconds = 0.0  # by loading, since the process began
        jax.monitoring.register_event_duration_secs_listener(self._add_duration)
        jax.monitoring.register_event_listener(self._add_event)

    def _add_duration(
        self, event: str, duration_secs: float, **details: str | int
    ) -> None:
        self._count += event == self.COMPILED
        self.saved_seconds += duration_secs * (event == self.SAVED)
        if event in (self.TRACED, self.LOWERED, self.COMPILED):
            self._seconds += duration_secs

    def _add_event(self, event: str, **details: str | int) -> None:
        self._count -= event == self.LOADED

    def take(self) -> dict[str, float]:
        """Return the metrics since the last call."""
        metrics = {
            "perf/compilations": float(self._count),
            "perf/compile_seconds": self._seconds,
        }
        self._count, self._seconds = 0, 0.0
        return metrics


compilations = Compilations()  # JAX's listeners are global, so is the count


def read(path: Path, **fields: type | UnionType) -> list[dict]:
    """Return the objects of JSON lines, up to a line that a kill cut short.

    Objects without `fields` of these types are omitted, as something else wrote them.
    Without a file there are none.
    """
    if not path.is_file():
        return []
    rows = []
    # Numbers that fit in 64 bits: others are no steps, and may not even fit in a float.
    integer = lambda digits: int(digits) if len(digits) < 19 else float(digits)
    # Not `splitlines`, which also splits at U+2028 and others within texts.
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line, parse_int=integer)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            break
        if all(isinstance(row.get(name), kind) for name, kind in fields.items()):
            rows.append(row)
    return rows


def _line(row: Mapping[str, int | float]) -> str:
    # JSON has no NaN and no infinity; both become null.
    finite = lambda x: None if isinstance(x, float) and not math.isfinite(x) else x
    return json.dumps({name: finite(value) for name, value in row.items()}) + "\n"
