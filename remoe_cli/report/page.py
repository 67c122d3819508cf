"""One self-contained page: no other file, no other host, nothing that runs but its own script.

Its Content-Security-Policy names its script and its style by their sha256 and allows nothing else, so a text that gets into the page as
markup neither runs nor loads anything. All texts are escaped all the same.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

from remoe_cli import owned, recognise
from remoe_cli.errors import UsageError
from remoe_cli.plan.document import LayerPlan, Plan
from remoe_cli.report import style, svg
from remoe_cli.report.content import Content
from remoe_cli.report.sections import footer, header, section, sections


def refuse_page(path: Path) -> None:
    """Refuse a path to which `write_page` cannot write.

    Raises: UsageError for another suffix than .html, and where `owned.refuse_file` raises it.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{path} is not a name for a report.", "Give a name that ends in .html.")
    owned.refuse_file(path, recognise.REPORT)


def write_page(content: Content, path: Path) -> None:
    """Write the page of a report.

    Raises: UsageError where `refuse_page` does.
    """
    refuse_page(path)
    text = page(content)
    with owned.writing(path, recognise.REPORT) as temporary:
        temporary.write_text(text, encoding="utf-8")


def page(content: Content) -> str:
    """Put the page together. The same content gives the same bytes."""
    shown = list(sections(content))
    look = _file("page.css")
    light, dark, printed = (style.css_colours(kind) for kind in ("light", "dark", "print"))
    css = f":root{{{light}}}@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}@media print{{:root{{{printed}}}}}\n{look}"
    script = _file("page.js")
    links = "".join(f'<li><a href="#{one.name}">{svg.escape(one.short)}</a></li>' for one in shown)
    return Template(_file("page.html")).substitute(
        title=svg.escape(f"{content.model or 'Receipts'}: remoe report"),
        style=css,
        style_digest=_digest(css),
        script=script,
        script_digest=_digest(script),
        header=header(content),
        navigation=f'<nav aria-label="Sections"><ul>{links}</ul></nav>',
        sections="\n".join(section(one) for one in shown),
        footer=footer(content),
        data=_json(_data(content)),
    )


def _file(name: str) -> str:
    return (resources.files("remoe_cli.report") / "page_files" / name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode()


def _json(data: Any) -> str:
    """Write JSON that no text in it can end the script element of."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return (
        text.replace("&", "\\u0026")
        .replace("<", "\\u003c")
        .replace(">", "\\u003e")
        .replace("\u2028", "\\u2028")
        .replace("\u2029", "\\u2029")
    )


# The data of the script


def _data(content: Content) -> dict[str, Any]:
    data: dict[str, Any] = {"colours": {kind: style.colours(kind) for kind in ("light", "dark", "print")}}
    plan, routing = content.plan, content.routing
    if routing is not None:
        data |= {"layers": routing.layers, "experts": routing.experts, "top_k": routing.top_k}
        data["octaves"] = routing.octaves
        data["uses"] = [{"title": use.title, "most": float(use.shares.max()), "shares": _packed(use.shares)} for use in routing.uses]
    if plan is not None:
        data |= {"layers": [layer.layer for layer in plan.layers], "experts": plan.model.experts_per_layer}
        rows = zip(plan.layers, plan.costs.layers_usd, strict=False)
        data["placement"] = {
            "owners": _encoded(np.stack([_owners(plan, layer) for layer in plan.layers])),
            "layers": [{"memory_mb": at.memory_mb, "replicas": at.replicas, "functions": len(at.parts), "usd": usd} for at, usd in rows],
        }
    if content.table is not None:
        data["table"] = content.table.model_dump(mode="json")
    return data


def _packed(shares: npt.NDArray[np.float64]) -> str:
    """Encode shares in parts of 65,535 of the largest one."""
    return _encoded(np.round(shares / shares.max() * 65535))


def _encoded(values: npt.NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(values, dtype="<u2").tobytes()).decode()


def _owners(plan: Plan, layer: LayerPlan) -> npt.NDArray[np.uint16]:
    """Write where each expert is: 0 on the GPU, 1 in CPU memory, 2 and more in the functions."""
    owner = np.ones(plan.model.experts_per_layer, dtype=np.uint16)
    owner[list(layer.gpu)] = 0
    for number, part in enumerate(layer.parts):
        owner[list(part)] = number + 2
    return owner
