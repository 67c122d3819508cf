"""Formats of request traces: one table of the columns and units that projects publish, and how a row's columns are recognised.

Two names are one if they differ in nothing but case, spaces, hyphens and underscores: `Request tokens` is `request_tokens`. A dot leads
into an object: `usage.prompt_tokens`. Generated tokens count the first one, which a prompt's prefill gives; `n_out` does not count it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

Key = int | str  # of a row's cell: the column's number in CSV, its name in JSON

MS, US, NS = 1e3, 1e6, 1e9  # units in a second
SECONDS = None  # seconds or dates; numbers as large as an epoch time in ms, us or ns are taken as that


@dataclass(frozen=True)
class TraceFormat:
    """One published format. Where several columns are named, a row's first that is not empty counts.

    name       what users know the format by; empty for remoe's own
    source     where its names and units are published
    n_in       columns with the number of prompt tokens
    generated  columns with the number of generated tokens, the first one included
    times      columns with the time of arrival, each with its units in a second (SECONDS where the file tells)
    known_by   further columns that tell this format from others with the same names
    """

    name: str
    source: str
    n_in: tuple[str, ...]
    generated: tuple[str, ...]
    times: Mapping[str, float | None]
    known_by: tuple[str, ...] = ()


# Names that many logs share. They serve remoe's own format too, and every file that no row of the table knows.
_PROMPT = (
    *("prompt_tokens", "input_tokens", "input_length", "prompt_length", "input_len", "prompt_len", "num_prompt_tokens", "num_input_tokens"),
    *("tokens_prompt", "ContextTokens", "usage.prompt_tokens", "usage.input_tokens", "response.usage.prompt_tokens"),
    *("gen_ai.usage.input_tokens", "attributes.gen_ai.usage.input_tokens"),
)
_ANSWER = (
    *("generated_tokens", "completion_tokens", "output_tokens", "output_length", "completion_length", "response_length", "output_len"),
    *("num_output_tokens", "num_generated_tokens", "tokens_completion", "usage.completion_tokens", "usage.output_tokens"),
    *("response.usage.completion_tokens", "gen_ai.usage.output_tokens", "attributes.gen_ai.usage.output_tokens"),
)
_TIMES = (
    *("timestamp", "arrival_time", "arrival_timestamp", "arrived_at", "start_time", "started_at", "request_time", "request_timestamp"),
    *("created", "created_at", "datetime", "ts", "time"),
)
_UNITS = {"": SECONDS, "_s": SECONDS, "_sec": SECONDS, "_seconds": SECONDS, "_ms": MS, "_us": US, "_ns": NS}
_ANY_TIMES: dict[str, float | None] = {name + suffix: unit for name in _TIMES for suffix, unit in _UNITS.items()}

# The first that knows a row's columns is taken, so narrower ones come first.
FORMATS = (
    TraceFormat("", "remoe's own", ("n_in",), _ANSWER, {}),
    TraceFormat(
        "Azure LLM inference 2023 and 2024",
        "github.com/Azure/AzurePublicDataset, AzureLLMInferenceDataset2023.md and AzureLLMInferenceDataset2024.md",
        ("ContextTokens",),
        ("GeneratedTokens",),
        {"TIMESTAMP": SECONDS},  # dates, those of 2024 with their zone
    ),
    TraceFormat(
        "Qwen Bailian",
        "github.com/alibaba-edu/qwen-bailian-usagetraces-anon, README.md ('Seconds since request arrive')",
        ("input_length",),
        ("output_length",),
        {"timestamp": SECONDS},
        known_by=("chat_id",),
    ),
    TraceFormat(
        "RAGPulse",
        "github.com/flashserve/RAGPulse, README.md (seconds 'from the beginning of the trace')",
        ("input_length",),
        ("output_length",),
        {"timestamp": SECONDS},
        known_by=("hash_ids.user_input",),
    ),
    TraceFormat(
        "ServeGen's batch tasks",
        "github.com/alibaba/ServeGen, data/offline/README.md (no times of arrival; `duration` is a request's, in ms)",
        ("input_length",),
        ("output_length",),
        {},
        known_by=("request_id", "duration"),
    ),
    TraceFormat(
        "Mooncake",
        "github.com/kvcache-ai/Mooncake, FAST25-release/README.md and issue 4; ai-dynamo/aiperf, docs/benchmark-modes/trace-replay.md (ms)",
        ("input_length",),
        ("output_length",),
        {"timestamp": MS},
    ),
    TraceFormat(
        "BurstGPT",
        "github.com/HPMLL/BurstGPT, README.md (a failure has 0 response tokens); ai-dynamo/aiperf, docs/tutorials/burst-gpt-trace.md (s)",
        ("Request tokens",),
        ("Response tokens",),
        {"Timestamp": SECONDS},
    ),
    TraceFormat(
        "ServeGen",
        "github.com/alibaba/ServeGen, examples/basic_usage.py (workload.csv; `rate_fn` and `duration` are in seconds)",
        ("input_tokens",),
        ("output_tokens",),
        {"timestamp": SECONDS},
        known_by=("request_id", "timestamp"),
    ),
    TraceFormat(
        "LiteLLM spend logs",
        "github.com/BerriAI/litellm, schema.prisma, model LiteLLM_SpendLogs (startTime is a DateTime, status 'success' or 'failure')",
        ("prompt_tokens",),
        ("completion_tokens",),
        {"startTime": SECONDS},
        known_by=("startTime",),
    ),
    TraceFormat(
        "OpenAI responses",
        "OpenAI API reference, the chat completion object (`created`) and the response object (`created_at`), both in Unix seconds",
        ("usage.prompt_tokens", "usage.input_tokens"),
        ("usage.completion_tokens", "usage.output_tokens"),
        {"created": SECONDS, "created_at": SECONDS},
    ),
    TraceFormat(
        "OpenAI batch output",
        "OpenAI API reference, the request output object of a batch",
        ("response.body.usage.prompt_tokens", "response.body.usage.input_tokens"),
        ("response.body.usage.completion_tokens", "response.body.usage.output_tokens"),
        {"response.body.created": SECONDS, "response.body.created_at": SECONDS},
        known_by=("custom_id",),
    ),
    TraceFormat(
        "Vidur",
        "github.com/microsoft/vidur, data/processed_traces/ (s), vidur/entities/request.py ('one decode token when the prefill completes')",
        ("num_prefill_tokens",),
        ("num_decode_tokens",),
        {"arrived_at": SECONDS},
    ),
    TraceFormat(
        "vLLM and SGLang benchmarks",
        "github.com/vllm-project/vllm, vllm/benchmarks/serve.py (--save-detailed); sgl-project/sglang, bench_serving.py (--output-details)",
        ("input_lens",),
        ("output_lens",),
        {"start_times": SECONDS},
    ),
    TraceFormat(
        "SplitwiseSim",
        "github.com/Mutinifni/splitwise-sim, README.md ('all simulation times are assumed to be specified in seconds')",
        ("prompt_size",),
        ("token_size",),
        {"arrival_timestamp": SECONDS},
    ),
    TraceFormat(
        "LLMServingSim",
        "github.com/casys-kaist/LLMServingSim, flat requests",
        ("input_toks",),
        ("output_toks",),
        {"arrival_time_ns": NS},
    ),
    TraceFormat(
        "AIPerf records",
        "github.com/ai-dynamo/aiperf, docs/tutorials/working-with-profile-exports.md (profile_export.jsonl)",
        ("metrics.input_sequence_length.value",),
        ("metrics.output_sequence_length.value",),
        {"metadata.request_start_ns": NS},
    ),
    TraceFormat(
        "LLMPerf",
        "github.com/ray-project/llmperf, src/llmperf/common_metrics.py",
        ("number_input_tokens",),
        ("number_output_tokens",),
        {},
    ),
)
_OTHER = TraceFormat("", "names that many logs share", ("n_in", *_PROMPT), _ANSWER, {})

# How many requests a row sums up: OpenAI's usage of an organization (UsageCompletionsResult), LiteLLM's daily spend (schema.prisma).
_SUMMED = ("num_model_requests", "api_requests")
_LISTED = 50  # names of ignored columns that are kept
_NAME_LENGTH = 200


def _is_there(value: Any) -> bool:
    return bool(value) and not (isinstance(value, str) and value.strip().lower() in _NOTHING)


def _is_bad_status(value: Any) -> bool:
    text = str(value).strip().lower()
    code = _HTTP_CODE.match(text)
    return not code[1].startswith("2") if code else bool(_BAD_WORD.search(text) and not _NO_ERROR.match(text))


def _is_error(value: Any) -> bool:
    return _is_there(value) and not (isinstance(value, str) and _NO_ERROR.match(value.strip().lower()))


_NOTHING = frozenset(("", "0", "0.0", "false", "f", "no", "none", "null", "nan", "[]", "{}"))
_HTTP_CODE = re.compile(r"(?:http/\S+ +)?([1-5]\d\d)(?:\.0+)?(?: |$)")
_BAD_WORD = re.compile(r"fail|error|time[ _-]?d?[ _-]?out|cancel|abort|reject|refuse|denied|exception|expired|unavailable")
_NO_ERROR = re.compile(r"no(?:ne\b|t|[ _-]|error)")
# Columns, of any format, that say whether a request failed, and which of their values say so.
_OUTCOMES: tuple[tuple[tuple[str, ...], Callable[[Any], bool]], ...] = (
    (("status", "status_code", "http_status", "http_status_code", "http_code", "response_code", "response.status_code"), _is_bad_status),
    (("error", "errors", "error_code", "error_message", "error_msg", "exception"), _is_error),
    (("success", "succeeded", "is_success"), lambda value: not _is_there(value)),
    (("failed", "cancelled", "was_cancelled", "metadata.was_cancelled", "aborted", "is_error"), _is_there),
)


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of a row by what they hold: keys of its cells, the first that is not empty counts.

    times    for each column of times its key, its units in a second, and its name
    outcome  the key of each column that says whether the request failed, and which values say so
    summed   keys of the columns with the number of requests in a row
    used     names of the columns that are read, but for the time
    ignored  names of the others, at most _LISTED
    """

    format: TraceFormat
    n_in: tuple[Key, ...]
    n_out: tuple[Key, ...]
    generated: tuple[Key, ...]
    weight: tuple[Key, ...]
    times: tuple[tuple[Key, float | None, str], ...]
    outcome: tuple[tuple[Key, Callable[[Any], bool]], ...]
    summed: tuple[Key, ...]
    used: tuple[str, ...]
    ignored: tuple[str, ...]


def plain(name: str) -> str:
    """Reduce a column's name to what its spellings have in common; of a very long one the start."""
    return _plain(name if len(name) <= _NAME_LENGTH else name[:_NAME_LENGTH])


@lru_cache(4096)
def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum() or letter == ".")


def recognise(fields: Iterable[tuple[str, Key]]) -> Columns:
    """Find out what the columns of a row hold, from their names and the keys of their cells."""
    names: dict[str, tuple[Key, str]] = {}
    for name, key in fields:
        names.setdefault(plain(name), (key, name[:_NAME_LENGTH]))

    def find(wanted: Iterable[str]) -> dict[Key, str]:
        return dict(names[plain(name)] for name in wanted if plain(name) in names)

    def fits(form: TraceFormat) -> bool:
        return bool(find(form.n_in) and find(("n_out", *form.generated)) and len(find(form.known_by)) == len(form.known_by))

    form = next(filter(fits, FORMATS), _OTHER)
    n_in, n_out, generated, weight = find(form.n_in), find(("n_out",)), find(form.generated), find(("weight",))
    times, units = find((*form.times, *_ANY_TIMES)), {plain(name): unit for name, unit in (_ANY_TIMES | dict(form.times)).items()}
    outcome = [(key, name, says) for wanted, says in _OUTCOMES for key, name in find(wanted).items()]
    used = (*list(n_in.values())[:1], *list((n_out or generated).values())[:1], *weight.values(), *(name for _, name, _ in outcome))
    inside = {name[: dot.start()] for _, name in names.values() for dot in re.finditer(r"\.", name)}
    known = {*used, *list(times.values())[:1], *inside, ""}
    return Columns(
        form,
        tuple(n_in),
        tuple(n_out),
        tuple(generated),
        tuple(weight),
        tuple((key, units[plain(name)], name) for key, name in times.items()),
        tuple((key, says) for key, _, says in outcome),
        tuple(find(_SUMMED)),
        used,
        tuple(islice((name for _, name in names.values() if name not in known), _LISTED)),
    )


def failed(columns: Columns, cells: Any) -> bool:
    """Say whether a row stands for a request that failed."""
    return any(cells[key] not in (None, "") and says(cells[key]) for key, says in columns.outcome)
