"""The page: it loads nothing, no text of an input is markup in it, and what an input does not have has no section."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from remoe_cli.artifacts import write_json
from remoe_cli.errors import UsageError
from remoe_cli.plan.catalog.catalog import read_catalog
from remoe_cli.plan.document import LayerPlan, Source
from remoe_cli.progress import no_progress
from remoe_cli.report import style
from remoe_cli.report.charts import bursts_sentence
from remoe_cli.report.content import Content, content_of
from remoe_cli.report.inputs import Inputs, ReceiptFigures, Receipts, read_inputs
from remoe_cli.report.page import page, write_page
from remoe_cli.report.pictures import PICTURES, draw_pictures
from remoe_cli.report.routing import Routing, Skew, Use, routing_of
from remoe_cli.report.summary import labels, measured_table
from remoe_cli.simulate.break_even import LEAST_PER_HOUR, MOST_PER_HOUR, BreakEvenBursts
from remoe_cli.simulate.summary import Figure
from remoe_cli.simulate.wording import break_even_document
from tests.support.synthetic import plan_by_hand, plan_of, synthetic_profile, tiny_catalog

EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
RECEIPT = {"prompt_tokens": 5, "generated_tokens": 4, "ttft_s": 0.2, "tpot_s": 0.05, "total_s": 0.4, "cost": {"total_usd": 2e-6}}
PREDICTED = {"predicted": {"cost_usd_per_request": 1.8e-6, "ttft_s": 0.21, "tpot_s": 0.045}}


class Read(HTMLParser):
    """The elements of a page, the texts of its sections, and what is wrong with its nesting."""

    EMPTY = ("meta", "input", "stop", "rect", "path", "circle")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"

    def ids(self, tag: str) -> list[str]:
        return [attributes["id"] or "" for name, attributes in self.elements if name == tag and "id" in attributes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Content:
    """A report with every section but that of the predictors, which need a tokenizer."""
    folder = tmp_path_factory.mktemp("whole")
    profile = synthetic_profile(folder / "profile", prompts=24, hidden_size=8)
    catalog = tiny_catalog()
    plan = plan_of(profile, catalog, remote_share=0.5, requests_per_hour=20.0)
    write_json(folder / "plan.json", plan)
    figures = (ReceiptFigures.model_validate(RECEIPT | PREDICTED), ReceiptFigures.model_validate(RECEIPT | PREDICTED | {"cold_starts": 2}))
    inputs = Inputs(profile, plan, folder / "plan.json", Receipts((folder / "answers.jsonl",), figures, without=1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("remoe_cli.report.content.read_catalog", lambda path: catalog)  # it is no file
        return content_of(inputs, no_progress)


SECTIONS = ["costs", "placement", "activation", "by-traffic", "break-even", "frontier", "skew", "pairs", "cold-start", "measured"]


def test_every_section_is_there_and_is_named_in_the_navigation(whole: Content) -> None:
    read = Read(page(whole))
    assert read.open == [] and read.ids("section") == SECTIONS
    assert [attributes["href"] for tag, attributes in read.elements if tag == "a"][1:] == [f"#{name}" for name in SECTIONS]
    assert whole.left_out == ()


def test_what_is_not_there_has_no_section(whole: Content) -> None:
    assert whole.receipts is not None
    of_profile = replace(whole, plan=None, table=None, frontier=(), bursts=(), starts=(), receipts=None)
    assert Read(page(of_profile)).ids("section") == ["activation", "skew", "pairs"]
    assert Read(page(Content("", (), receipts=whole.receipts))).ids("section") == ["measured"]
    alone = replace(whole, routing=None, table=None, frontier=(), bursts=(), starts=(), receipts=None)
    text = page(alone)
    assert Read(text).ids("section") == ["costs", "placement"] and 'id="slider-price"' not in text.partition("<script")[0]


def test_the_page_loads_nothing_and_runs_only_its_own_script(whole: Content) -> None:
    text = page(whole)
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert policy
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].split(";"))
    assert rules["default-src"] == "'none'" and {"style-src", "script-src", "base-uri", "form-action"} < rules.keys()
    for tag in ("style", "script"):
        (inner,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert rules[f"{tag}-src"] == f"'sha256-{base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()}'"
    for tag, attributes in Read(text).elements:
        assert not {"src", "srcset", "style", "action", "data", "poster"} & attributes.keys(), (tag, attributes)
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert attributes.get("href", "#").startswith("#") and tag not in ("link", "iframe", "object", "embed", "base", "img")
    assert not re.search(r"(?:https?:)?//(?!www\.w3\.org/2000/svg)\w+\.\w", re.sub(r"(?m)^\s*//.*$", "", text)), "an address"


def test_the_line_of_bursts_is_drawn_and_told(whole: Content) -> None:
    points = (
        BreakEvenBursts(1.0, False, Figure(48.2, 45.0, 51.0), 0.0, (1.0, 9.0), "all experts local, box", (0.5, 2.0)),
        BreakEvenBursts(6.0, False, Figure(MOST_PER_HOUR, MOST_PER_HOUR, MOST_PER_HOUR), 0.0, (1.0, math.nan), None, (math.nan, math.nan)),
        BreakEvenBursts(2.5, True, Figure(LEAST_PER_HOUR, LEAST_PER_HOUR, LEAST_PER_HOUR), 0.0, (1.0, 9.0), "a GPU", (0.5, 2.0)),
    )
    said = bursts_sentence(points)
    at_random, in_bursts, of_trace = said.split("; ")
    assert at_random == "Where requests come at random, this plan costs less than what is always on up to 48.2 requests an hour"
    assert in_bursts.startswith("where requests come in bursts (burstiness 6), this plan costs less than what is always on up to 100,000 ")
    assert of_trace.endswith(
        "the trace (burstiness 2.5), what is always on costs less from 0.1 requests an hour on, the least that is looked at."
    )
    failing = (*points[:2], replace(points[2], refused=0.3))
    assert bursts_sentence(failing).endswith("this plan leaves 30% of them without an answer.")
    text = page(replace(whole, bursts=points))
    drawn = text.partition('id="break-even"')[2].partition("</section>")[0]
    assert html.escape(said) in drawn and drawn.count('class="line plan"') == 2  # with that of the legend
    for row in ("48.2</td><td>45 to 51</td><td>1 s / 9 s", "always</td>", "<td>nothing</td><td>- / -", "2.5, of the trace</th><td>never"):
        assert row in drawn, row
    found = [break_even_document(one) for one in points]
    assert [one["cheaper"] for one in found] == ["below", "always", "never"] and found[0]["requests_per_hour"]["mean"] == 48.2
    json.dumps(found, allow_nan=False)


def test_texts_are_no_markup(whole: Content) -> None:
    assert whole.plan is not None and whole.table is not None and whole.routing is not None and whole.receipts is not None
    plan = whole.plan.model_copy(
        update={"reason": EVIL, "notes": (EVIL,), "main": whole.plan.main.model_copy(update={"name": EVIL}), "verdict": "recommended"}
    )
    machines = tuple(one.model_copy(update={"title": EVIL, "spec": EVIL}) for one in whole.table.baselines[:1])
    evil = replace(
        whole,
        model=EVIL,
        sources=((EVIL, EVIL, EVIL),),
        plan=plan,
        table=whole.table.model_copy(update={"main": whole.table.main.model_copy(update={"spec": EVIL}), "baselines": machines}),
        frontier=tuple(point._replace(main=EVIL) for point in whole.frontier),
        bursts=tuple(replace(one, against=EVIL) for one in whole.bursts),
        starts=tuple(replace(start, what=EVIL) for start in whole.starts),
        routing=replace(whole.routing, uses=tuple(Use(EVIL, use.shares) for use in whole.routing.uses)),
        left_out=(EVIL,),
    )
    text = page(evil)
    clean, dirty = Read(page(whole)), Read(text)
    assert "alert(1)" in text and "<script>alert" not in text and "<img" not in text
    assert [tag for tag, _ in dirty.elements].count("script") == [tag for tag, _ in clean.elements].count("script") == 2
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert json.loads(data)["uses"][0]["title"] == EVIL


def test_neither_prompts_nor_answers_nor_folders_get_into_the_page(tmp_path: Path, whole: Content) -> None:
    answers = tmp_path / "secret-folder" / "answers.jsonl"
    answers.parent.mkdir()
    row = {"text": "the answer", "prompt": "the prompt", "token_ids": [1], "receipt": RECEIPT | PREDICTED}
    answers.write_text(json.dumps(row) + "\n")
    plan = replace(whole, receipts=read_inputs([answers]).receipts)
    text = page(plan) + page(content_of(read_inputs([answers]), no_progress))
    assert "the answer" not in text and "the prompt" not in text and "secret-folder" not in text and str(tmp_path.parent) not in text
    assert "answers.jsonl" in text


def test_the_same_content_gives_the_same_bytes(whole: Content, tmp_path: Path) -> None:
    for name in ("a.html", "b.html", "a.html"):  # its own page is replaced
        write_page(whole, tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    (tmp_path / "mine.html").write_text("<!doctype html><title>mine</title>")
    with pytest.raises(UsageError, match="is not a report that remoe made"):
        write_page(whole, tmp_path / "mine.html")
    with pytest.raises(UsageError, match="is not a name for a report"):
        write_page(whole, tmp_path / "report.txt")


def test_a_page_of_the_largest_model_has_less_than_2_mb(whole: Content) -> None:
    """58 layers of 256 experts, two thirds of them remote at random, with a heat map for each phase and group."""
    layers, experts = 58, 256
    random = np.random.default_rng(0)
    shares = random.dirichlet(np.ones(experts), layers) * 8
    uses = tuple(Use(f"group {number}", shares) for number in range(9))
    flat = np.linspace(0, 1, experts + 1)
    routing = Routing(tuple(range(3, 3 + layers)), experts, 8, 1000, 10**6, uses, Skew(flat, flat, flat), None, None)
    placed = tuple(
        LayerPlan(
            layer=number,
            remote=tuple(sorted(random.permutation(experts)[:170].tolist())),
            memory_mb=1769,
            replicas=1,
            gpu=(),
        )
        for number in range(layers)
    )
    plan = plan_by_hand(placed)
    plan = plan.model_copy(update={"model": plan.model.model_copy(update={"experts_per_layer": experts})})
    assert whole.table is not None
    many = whole.table.model_copy(update={"bill": whole.table.bill.model_copy(update={"terms": ((1.23456789e-5, 0.123456789),) * 5000})})
    assert 300_000 < len(page(replace(whole, routing=routing, plan=plan, table=many)).encode()) < 2_000_000


def test_a_plan_whose_inputs_are_not_here_is_shown_without_them(tmp_path: Path) -> None:
    gone = Source(path=str(tmp_path / "my-folder" / "p"), sha256="0" * 64)
    layer = LayerPlan(layer=0, remote=(1, 2), memory_mb=128, replicas=1)
    write_json(tmp_path / "plan.json", plan_by_hand((layer,), profile=gone))
    found = content_of(read_inputs([tmp_path / "plan.json"]), no_progress)
    assert found.table is None and found.routing is None and "no sliders" in found.left_out[0]
    assert "my-folder" in found.details[0] and "my-folder" not in page(found)  # folders are said in the terminal only
    assert Read(page(found)).ids("section") == ["costs", "placement"]


def test_a_plan_whose_figures_are_not_those_of_the_formulas_has_no_sliders(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path / "p")
    plan = plan_of(profile, read_catalog("local"), n_in=9, n_out=9)
    bent = plan.model_copy(update={"tpot_s": 2 * plan.tpot_s})
    found = content_of(Inputs(profile, bent, tmp_path / "plan.json", None), no_progress)
    assert found.table is None and found.left_out[0].startswith("There are no sliders, because") and "the plan states" in found.details[0]
    assert content_of(Inputs(profile, plan, tmp_path / "plan.json", None), no_progress).table is not None


def test_another_profile_than_the_plans_gives_no_sliders(whole: Content, tmp_path: Path) -> None:
    other = synthetic_profile(tmp_path / "other", seed=5)
    plan = plan_of(other, tiny_catalog(), n_in=9, n_out=9)
    found = content_of(Inputs(synthetic_profile(tmp_path / "p", seed=6), plan, tmp_path / "plan.json", None), no_progress)
    assert found.table is None and found.routing is not None and "not the one that the plan was made from" in found.left_out[0]
    with pytest.raises(UsageError, match=r"The plan is of 2 MoE layers with 4 experts, and the profile .* of 3 with 4"):
        content_of(Inputs(synthetic_profile(tmp_path / "q", layers=3), plan, tmp_path / "plan.json", None), no_progress)


def test_the_use_of_experts_is_counted(tmp_path: Path) -> None:
    profile = synthetic_profile(tmp_path / "p", prompts=24, hidden_size=8)
    found = routing_of(profile)
    assert found is not None and found.groups is not None and sum(found.groups.sizes) == 24
    counts = profile.arrays["prefill_counts"].sum(axis=0) + profile.arrays["decode_counts"].sum(axis=0)
    assert found.uses[0].shares == pytest.approx(counts / (24 * 55))  # of 40 + 15 tokens a prompt
    assert [use.title for use in found.uses[:3]] == ["all tokens", "tokens of prompts", "generated tokens"]
    assert all(use.shares.sum(axis=1) == pytest.approx(2) for use in found.uses)
    falling = -np.sort(-counts, axis=1)
    assert found.skew.median[1] == pytest.approx(np.median(falling[:, 0] / counts.sum(axis=1)))
    assert found.skew.median[0] == 0 and found.skew.least[-1] == pytest.approx(1)


def test_few_prompts_have_no_groups_and_no_pairs(tmp_path: Path) -> None:
    found = routing_of(synthetic_profile(tmp_path / "p", prompts=8))
    assert found is not None and found.groups is None and found.pairs is None


def test_pictures_are_drawn_for_what_is_there(whole: Content, tmp_path: Path) -> None:
    made = draw_pictures(whole, tmp_path / "png")
    assert {path.stem for path in made} == set(PICTURES) - {"predictors"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in made)
    assert draw_pictures(Content("", ()), tmp_path / "none") == [] and not (tmp_path / "none").exists()


def test_the_terminal_gets_the_essentials(whole: Content) -> None:
    said = dict(labels(whole))
    assert said["remote experts"] == "4 of 8" and said["model"] == "synthetic" and "take half" in said["routing"]
    table = measured_table(whole)
    assert table is not None and [row[:2] for row in table[2]][:2] == [("TTFT, s, warm", "1"), ("TTFT, s, cold", "1")]
    assert table[2][0][2:] == ("0.2", "0.21", "0.95", "0.2")
    assert whole.receipts is not None
    predicted = whole.receipts.figures[0]
    slow, failed = (
        predicted.model_copy(update={"predicted": None, "ttft_s": 9.0}),
        predicted.model_copy(update={"answered": False, "ttft_s": 9.0}),
    )
    mixed = replace(whole, receipts=replace(whole.receipts, figures=(predicted, slow, failed)))
    of_mixed = measured_table(mixed)
    assert of_mixed is not None and of_mixed[2][0][1:] == ("1", "0.2", "0.21", "0.95", "0.2")  # of the same request in all columns


@pytest.mark.parametrize("kind", ["light", "dark", "print"])
def test_contrasts_are_high_enough(kind: style.Kind) -> None:
    """WCAG 2.2: 4.5 for text, 3 for marks; the ramp changes in one direction only."""
    found = style.colours(kind)

    def contrast(one: str, other: str) -> float:
        a, b = sorted(style.luminance(str(found[name])) for name in (one, other))
        return (b + 0.05) / (a + 0.05)

    for ground in ("ground", "card"):
        assert min(contrast(name, ground) for name in ("text", "soft", "plan", "other")) >= 4.5
        assert min(contrast(name, ground) for name in ("cpu", "gpu", "remote", "fees")) > 3
    steps = [style.luminance(colour) for colour in found["ramp"]]
    assert steps == sorted(steps) or steps == sorted(steps, reverse=True)
