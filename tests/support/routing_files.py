"""Files of routing as other programs leave them, made here for a small model: what the importers are tested against."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file

from remoe_cli.model.spec import MoeSpec
from remoe_cli.profile.latency_record import Latency
from tests.support.synthetic import synthetic_profile

Array = npt.NDArray[Any]
# Of family deepseek_v2 in tests/support/families.py: a dense layer first.
SPEC = MoeSpec(
    family="deepseek_v2",
    dtype="float32",
    hidden_size=64,
    hidden_layers=3,
    moe_layers=(1, 2),
    experts_per_layer=8,
    top_k=2,
    expert_bytes=1000,
    nonexpert_bytes=1000,
    hidden_state_bytes=256,
    kv_layers=(),
)
LENGTHS, PROMPT = (5, 9, 4), (3, 6, 3)  # tokens of three sequences, and how many of them are the prompt's


def latency(tmp_path: Path) -> Latency:
    return synthetic_profile(tmp_path / "latency").record.latency


def make_ids(lengths: tuple[int, ...] = LENGTHS, layers: int = 2, seed: int = 0) -> Array:
    """Ids [T, L, k] of tokens that choose two of eight experts, the later ones less often."""
    random = np.random.default_rng(seed)
    scores = random.gumbel(size=(sum(lengths), layers, SPEC.experts_per_layer)) - 0.4 * np.arange(SPEC.experts_per_layer)
    return np.argsort(-scores, axis=2)[:, :, : SPEC.top_k]


def offsets(lengths: tuple[int, ...] = LENGTHS) -> Array:
    return np.cumsum([0, *lengths])


def count(ids: Array, lengths: tuple[int, ...] = LENGTHS) -> Array:
    """Counts [P, L, E], one loop an id: not the importer's way."""
    out = np.zeros((len(lengths), ids.shape[1], SPEC.experts_per_layer), dtype=np.int64)
    for row, (first, last) in enumerate(zip(offsets(lengths)[:-1], offsets(lengths)[1:], strict=True)):
        for token in ids[first:last]:
            for layer, experts in enumerate(token):
                for expert in experts:
                    out[row, layer, expert] += 1
    return out


def phases(ids: Array) -> tuple[Array, Array]:
    """Ids of the prompts' tokens and of the others."""
    early = np.concatenate([np.arange(n) < p for n, p in zip(LENGTHS, PROMPT, strict=True)])
    return ids[early], ids[~early]


def npy_base64(array: Array) -> str:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return base64.b64encode(buffer.getvalue()).decode()


def vllm_lines(ids: Array) -> list[dict[str, Any]]:
    """Current vLLM: one answer's experts of prompt and answer together, less its last token."""
    return [
        {
            "id": f"cmpl-{row}",
            "choices": [{"index": 0, "text": "x", "routed_experts": npy_base64(ids[first : first + n].astype(np.uint8))}],
            "usage": {"prompt_tokens": p, "completion_tokens": n - p + 1, "total_tokens": n + 1},
        }
        for row, (first, n, p) in enumerate(zip(offsets(), LENGTHS, PROMPT, strict=False))
    ]


def vllm_split_lines(ids: Array) -> list[dict[str, Any]]:
    """vLLM 0.21: nested lists, prompt and answer apart."""
    return [
        {"choices": [{"routed_experts": ids[first + p : first + n].tolist()}], "prompt_routed_experts": ids[first : first + p].tolist()}
        for first, n, p in zip(offsets(), LENGTHS, PROMPT, strict=False)
    ]


def sglang_lines(ids: Array) -> list[dict[str, Any]]:
    """SGLang's /generate: raw int32 for all hidden layers, the dense one zero."""
    whole = np.concatenate([np.zeros_like(ids[:, :1]), ids], axis=1).astype("<i4")
    return [
        {
            "text": "x",
            "meta_info": {
                "prompt_tokens": p,
                "completion_tokens": n - p + 1,
                "routed_experts": base64.b64encode(whole[first : first + n].tobytes()).decode(),
            },
        }
        for first, n, p in zip(offsets(), LENGTHS, PROMPT, strict=False)
    ]


def vllm_batch(ids: Array) -> list[dict[str, Any]]:
    """What `vllm run-batch` writes: the responses inside of lines, among them requests that failed or were aborted."""
    rows = [
        {"id": f"vllm-{row['id']}", "custom_id": row["id"], "response": {"status_code": 200, "request_id": "x", "body": row}, "error": None}
        for row in vllm_lines(ids)
    ]
    aborted = {"choices": [{"index": 0, "finish_reason": "abort", "routed_experts": None}], "usage": {"prompt_tokens": 3}}
    refused = {"object": "error", "message": "too long", "code": 400}
    return [
        {"id": "a", "custom_id": "a", "response": {"status_code": 400, "request_id": "x", "body": refused}, "error": None},
        rows[0],
        {"id": "b", "custom_id": "b", "response": None, "error": {"code": "batch_expired", "message": "too late"}},
        rows[1],
        {"id": "c", "custom_id": "c", "response": {"status_code": 200, "request_id": "x", "body": aborted}, "error": None},
        rows[2],
    ]


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sglang_stat(counts: Array) -> dict[str, Any]:
    """Counts of two passes in a ring of three, for all hidden layers."""
    whole = np.concatenate([np.zeros_like(counts[:, :1]), counts], axis=1)
    steps = np.concatenate([whole, np.zeros_like(whole[:1])]).astype(np.int32)
    return {"rank": 0, "logical_count": torch.from_numpy(steps), "average_utilization_rate_over_window": None}


# Physical experts are in reverse order, with expert 0 a second time.
PHYSICAL = np.tile(np.array([7, 6, 5, 4, 3, 2, 1, 0, 0]), (3, 1))


def sglang_per_pass(counts: Array) -> dict[str, Any]:
    records = []
    for number, row in enumerate(counts):
        physical = np.zeros((3, 9), dtype=np.int32)
        physical[1:, :8] = row[:, ::-1]
        physical[1:, 8], physical[1:, 7] = physical[1:, 7] // 2, physical[1:, 7] - physical[1:, 7] // 2
        records.append(
            {"forward_pass_id": number, "rank": 0, "gatherer_key": "primary", "global_physical_count": torch.from_numpy(physical)}
        )
    return {"records": records, "last_physical_to_logical_map": torch.from_numpy(PHYSICAL)}


def sglang_per_token(ids: Array) -> dict[str, Any]:
    """The first sequence as a pass over a prompt, the others as passes of decode tokens; ids in eight slots."""
    records = []
    for number, (first, n) in enumerate(zip(offsets(), LENGTHS, strict=False)):
        slots = np.full((3, n, 8), -1, dtype=np.int32)
        slots[1:, :, :2] = 7 - ids[first : first + n].transpose(1, 0, 2)
        records.append(
            {
                "forward_pass_id": number,
                "rank": 0,
                "input_ids": list(range(n)),
                "extend_seq_lens": [n] if number == 0 else None,
                "forward_mode": 1 if number == 0 else 2,
                "topk_ids_of_layer": torch.from_numpy(slots),
                "misc_objects": [],
                "global_physical_count": torch.zeros((3, 9), dtype=torch.int32),
            }
        )
    return {"records": records, "last_physical_to_logical_map": torch.from_numpy(PHYSICAL)}


def save_torch(path: Path, dump: dict[str, Any]) -> Path:
    torch.save(dump, path)
    return path


def table(counts: Array, *, layers: tuple[int, ...] = (1, 2), extra: dict[str, str] | None = None) -> str:
    """A long table of counts; columns of `extra` are the same in every row."""
    extra = extra or {}
    lines = [",".join(["task", "layer", "expert", "selections", "gate_weight_sum", *extra])]
    for row in range(len(counts)):
        for place, layer in enumerate(layers):
            for expert in range(counts.shape[2]):
                cells = [f"task{row}", str(layer), str(expert), str(counts[row, place, expert]), f"{expert / 7:.3f}", *extra.values()]
                lines.append(",".join(cells))
    return "\n".join(lines) + "\n"


def every_format(folder: Path, ids: Array) -> dict[str, Path]:
    """A valid file of each format, all with the same routing."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = count(ids)
    files = {name: folder / name for name in ("counts.npz", "phases.npz", "small.npz", "ids.npz", "counts.npy", "ids.npy", "c.safetensors")}
    np.savez(files["counts.npz"], counts=counts.astype(np.uint16), n_tokens=np.array(LENGTHS))
    early, late = (count(part, lengths) for part, lengths in zip(phases(ids), (PROMPT, tuple(np.subtract(LENGTHS, PROMPT))), strict=True))
    np.savez_compressed(files["phases.npz"], prefill_counts=early, decode_counts=late, prompt_tokens=np.array(PROMPT))
    np.savez(files["small.npz"], counts=counts[:, 1:], layers=np.array([2]))
    np.savez(files["ids.npz"], ids=ids.astype(np.uint8), seq_offsets=offsets(), prompt_tokens=np.array(PROMPT), task=np.array(["a"] * 3))
    np.save(files["counts.npy"], counts)
    np.save(files["ids.npy"], ids)
    save_file({"counts": counts, "seq_offsets": offsets()}, str(files["c.safetensors"]))
    files["vllm.jsonl"] = write_lines(folder / "vllm.jsonl", vllm_lines(ids))
    files["vllm_split.jsonl"] = write_lines(folder / "vllm_split.jsonl", vllm_split_lines(ids))
    files["sglang.jsonl"] = write_lines(folder / "sglang.jsonl", sglang_lines(ids))
    files["batch.jsonl"] = write_lines(folder / "batch.jsonl", vllm_batch(ids))
    files["sglang.json"] = folder / "sglang.json"
    files["sglang.json"].write_text(json.dumps(sglang_lines(ids), indent=1), encoding="utf-8")
    files["stat.pt"] = save_torch(folder / "stat.pt", sglang_stat(counts))
    files["per_pass.pt"] = save_torch(folder / "per_pass.pt", sglang_per_pass(counts))
    files["per_token.pt"] = save_torch(folder / "per_token.pt", sglang_per_token(ids))
    files["table.csv"] = folder / "table.csv"
    files["table.csv"].write_text(table(counts), encoding="utf-8")
    return files
