"use strict";
// Draws the two maps and lets the sliders recompute the costs. The formulas are those of what_if.py, over the same numbers.
const data = JSON.parse(document.getElementById("data").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");
const one = (selector, inside = document) => inside.querySelector(selector);
let printing = false;
const colours = () => data.colours[printing ? "print" : dark.matches ? "dark" : "light"];

// ---- What-if: the planner's sums ----

function waitS(wait, overheadS) {
  let sum = 0;
  for (const [weight, slack] of wait.terms) sum += weight * Math.max(0, overheadS - slack);
  return wait.constant_s + sum;
}

function billedUsd(table, factor) {
  let usd = 0;
  for (const [weight, inside] of table.bill.terms) {
    let granules = 0;
    for (const own of table.billed_s) granules += Math.ceil((factor * own + inside) / table.granule_s - 1e-6);
    usd += weight * granules * table.granule_s / table.billed_s.length;
  }
  return usd;
}

function coldShare(table, perHour) {
  if (table.cold_after_s === null || perHour === null) return table.cold_share;
  return Math.exp(-perHour * table.cold_after_s / 3600);
}

function wakingOf(table, perHour) {
  if (table.wake === null || perHour === null) return table.waking ?? [0, 1];
  const after = Math.exp(-perHour * table.wake[0] / 3600);
  const woken = after / (1 + perHour / 3600 * after * table.wake[1]);
  return [woken, 1 - woken];
}

const machineCold = (kind, cold, waking) => kind === "by-use" ? cold : kind === "scales-to-zero" ? waking[0] : 0;

function priced(table, machine, setting, warmS, lateS, tpotS, functionsUsd, cold, waking) {
  const ownCold = machineCold(machine.kind, cold, waking);
  const coldS = ownCold * machine.start_s + lateS, ttftS = warmS + coldS;
  const ownS = (warmS + table.n_out * tpotS) / machine.at_once + coldS;
  let busy = machine.usd_per_s * ownS, idle = 0, instances = 1;
  if (machine.kind !== "by-use") {
    if (setting.perHour === null) busy = null;
    else {
      instances = Math.max(1, Math.ceil(ownS * setting.perHour / 3600 - 1e-9));
      const up = machine.kind === "scales-to-zero" ? waking[1] : 1;
      const share = up * instances * machine.usd_per_hour / setting.perHour;
      busy = Math.min(busy, share);
      idle = share - busy;
    }
  }
  const fees = machine.fee_usd + ownCold * machine.reads_usd;
  return { title: machine.title, spec: machine.spec, ttftS, tpotS, instances, busy, idle, functions: functionsUsd, fees,
    usd: busy === null ? null : busy + idle + functionsUsd + fees };
}

const numbersOf = (table) => [table, ...table.others].map((each) => each.concurrency).sort((a, b) => a - b);
const atOnce = (table, number) => number === null ? table : [table, ...table.others].find((each) => each.concurrency === number);

function evaluate(plan, setting) {
  const table = atOnce(plan, setting.concurrency), overheadS = table.overhead_s * setting.overhead;
  const cold = coldShare(table, setting.perHour), waking = wakingOf(table, setting.perHour);
  const late = table.main.kind === "by-use" ? 0 : Math.max(0, cold - machineCold(table.main.kind, cold, waking));
  const promptS = waitS(table.ttft, overheadS), stepS = waitS(table.step, overheadS), others = table.main.at_once - 1;
  const ttftS = promptS + (others ? stepS : 0), tpotS = table.passes * stepS + others * promptS / Math.max(table.n_out, 1);
  const functions = setting.price * (billedUsd(table, setting.overhead) + table.bill.calls * table.call_usd + cold * table.bill.cold_usd)
    + table.bill.calls * table.log_usd + cold * table.bill.reads_usd;
  return [priced(table, table.main, setting, ttftS, late * table.functions_wait_s, tpotS, functions, cold, waking),
    ...(table.unquantised ? evaluate(table.unquantised, { ...setting, concurrency: null }) : []),
    ...table.baselines.map((machine) => priced(table, machine, setting, machine.ttft_s, 0, machine.tpot_s, 0, cold, waking))];
}

// ---- Words ----

function digits(value, count) { return Number(value.toPrecision(count)); }
function dollars(usd) {
  if (usd === 0) return "$0";
  if (usd >= 99.95) return "$" + Math.round(usd).toLocaleString("en-US");
  const places = Math.max(2 - Math.floor(Math.log10(usd)), 0);
  const text = usd.toFixed(Math.min(places, 100));
  return "$" + (text.includes(".") ? text.replace(/0+$/, "").replace(/\.$/, "") : text);
}
function seconds(s) { return s >= 99.95 ? Math.round(s).toLocaleString("en-US") + " s" : s >= 9.95 ? s.toFixed(1) + " s" : digits(s, 2) + " s"; }
function milliseconds(s) { return (s * 1e3 >= 1000 ? Math.round(s * 1e3).toLocaleString("en-US") : digits(s * 1e3, 3)) + " ms"; }
function count(value) { return value >= 1000 ? Math.round(value).toLocaleString("en-US") : String(digits(value, 3)); }
function percent(share) { return (share * 100 >= 10 && share < .995 ? (share * 100).toFixed(0) : digits(share * 100, share < .1 ? 2 : 3)) + "%"; }

const HOURS = 730;
function cost(usd, table, perHour) { return perHour === null ? usd / (table.n_out + 1) * 1e6 : usd * perHour * HOURS; }
function unit(perHour) { return perHour === null ? "per million output tokens" : "a month"; }

// ---- Sliders ----

function setUpWhatIf(table) {
  const sliders = {};
  for (const name of ["price", "overhead", "traffic", "concurrency"]) sliders[name] = document.getElementById("slider-" + name);
  const numbers = numbersOf(table), titles = evaluate(table, { price: 1, overhead: 1, perHour: table.per_hour, concurrency: null }).map((each) => each.title);
  const start = Object.fromEntries(Object.entries(sliders).map(([name, slider]) => [name, slider.value]));
  const perHourAt = (step) => Number(step) < 0 ? null : String(step) === start.traffic && table.per_hour !== null ? table.per_hour : 10 ** (step / 20 - 1);
  const setting = () => ({ price: 2 ** (sliders.price.value / 10), overhead: 2 ** (sliders.overhead.value / 10), perHour: perHourAt(sliders.traffic.value),
    concurrency: numbers[sliders.concurrency.value] });
  const say = (name, text) => {
    if (sliders[name].type === "hidden") return;
    one("output", sliders[name].parentElement).textContent = text;
    sliders[name].setAttribute("aria-valuetext", text);
  };

  function show() {
    const at = setting(), ways = evaluate(table, at), found = titles.map((title) => ways.find((each) => each.title === title) ?? null);
    const times = (factor) => factor === 1 ? "as planned" : digits(factor, 3) + " × the plan's";
    say("price", times(at.price));
    say("overhead", milliseconds(table.overhead_s * at.overhead) + (at.overhead === 1 ? ", as planned" : ""));
    say("traffic", at.perHour === null ? "unknown" : count(at.perHour) + " requests an hour");
    say("concurrency", at.concurrency === 1 ? "one at a time" : at.concurrency + " at once");
    const most = Math.max(...ways.map((each) => each.usd ?? 0)) || 1;
    found.forEach((each, index) => {
      const row = document.getElementById("way-" + index);
      row.classList.toggle("gone", each === null);
      if (each === null) {
        for (const box of row.querySelectorAll("rect")) box.setAttribute("width", 0);
        one("[data-value=usd]", row).textContent = "cannot serve so many at once";
        for (const name of ["ttft", "tpot"]) one("[data-value=" + name + "]", row).textContent = "-";
        return;
      }
      one("[data-instances]", row).textContent = each.instances > 1 ? each.instances + " × " : "";
      one("[data-spec]", row).textContent = each.spec;
      let left = 0;
      for (const part of ["busy", "functions", "idle", "fees"]) {
        const share = each.usd === null ? 0 : each[part] / most * 100;
        for (const box of row.querySelectorAll("[data-part=" + part + "] rect")) {
          box.setAttribute("x", left + "%");
          box.setAttribute("width", share + "%");
        }
        left += share;
      }
      one("[data-value=usd]", row).textContent = each.usd === null ? "no price without traffic" : dollars(cost(each.usd, table, at.perHour));
      one("[data-value=ttft]", row).textContent = seconds(each.ttftS);
      one("[data-value=tpot]", row).textContent = milliseconds(each.tpotS);
    });
    one("[data-unit]").textContent = "USD " + unit(at.perHour);
    one("#now").textContent = sentence(ways, at);
    drawTraffic(table, at);
  }

  function sentence(found, at) {
    const { baselines } = atOnce(table, at.concurrency), plan = found[0], others = found.slice(found.length - baselines.length);
    if (plan.usd === null) return "Without traffic, this plan's rented instance has no price for a request. Choose a traffic.";
    const price = (each) => dollars(cost(each.usd, table, at.perHour)) + " " + unit(at.perHour);
    const buyable = others.filter((each, index) => each.usd !== null && !baselines[index].ideal);
    const best = buyable.reduce((least, each) => least === null || each.usd < least.usd ? each : least, null);
    const begin = "This plan costs " + price(plan) + ", TPOT " + milliseconds(plan.tpotS) + ", TTFT " + seconds(plan.ttftS) + ".";
    if (best === null) return begin + " Nothing else can be bought.";
    const change = plan.usd / best.usd - 1;
    const than = Math.abs(change) < 5e-4 ? "the same as" : change >= 1 ? digits(change + 1, 3) + " times" : percent(Math.abs(change)) + (change < 0 ? " less than" : " more than");
    return begin + " That is " + than + " the cheapest alternative, " + best.title + " (" + price(best) + ").";
  }

  for (const slider of Object.values(sliders)) slider.addEventListener("input", show);
  one("#reset").addEventListener("click", () => { for (const name in sliders) sliders[name].value = start[name]; show(); });
  show();
}

function element(name, attributes, parent) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (parent) parent.append(made);
  return made;
}

// Cost of a month against traffic, both logarithmic.
function drawTraffic(table, at) {
  const svg = one("#traffic"), width = 400, height = 290, left = 62, right = 14, top = 12, bottom = 48;
  svg.replaceChildren();
  const hours = Array.from({ length: 121 }, (_, step) => 10 ** (step / 20 - 1));
  const now = atOnce(table, at.concurrency), titles = evaluate(table, at).map((each) => each.title);
  const lines = hours.map((perHour) => evaluate(table, { ...at, perHour }).map((each) => each.usd * perHour * HOURS));
  const all = lines.flat().filter((usd) => usd > 0);
  const low = Math.min(...all), high = Math.max(...all) * 1.2;
  const x = (perHour) => left + (Math.log10(perHour) + 1) / 6 * (width - left - right);
  const y = (usd) => height - bottom - Math.log(Math.max(usd, low) / low) / Math.log(high / low) * (height - top - bottom);
  for (let decade = -1; decade <= 5; decade++) {
    element("path", { class: "grid", d: `M${x(10 ** decade)} ${top}V${height - bottom}` }, svg);
    element("text", { class: "tick mid", x: x(10 ** decade), y: height - bottom + 16 }, svg).textContent = (10 ** decade).toLocaleString("en-US", { notation: "compact" });
  }
  const decades = Math.log10(high / low);
  for (let decade = Math.ceil(Math.log10(low)); 10 ** decade <= high; decade += decades > 7 ? 2 : 1) {
    element("path", { class: "grid", d: `M${left} ${y(10 ** decade)}H${width - right}` }, svg);
    element("text", { class: "tick end", x: left - 6, y: y(10 ** decade) + 4 }, svg).textContent = "$" + (10 ** decade).toLocaleString("en-US", { notation: "compact", maximumSignificantDigits: 2 });
  }
  element("path", { class: "axis", d: `M${left} ${top}V${height - bottom}H${width - right}` }, svg);
  element("text", { class: "label mid", x: (left + width - right) / 2, y: height - 8 }, svg).textContent = "requests an hour";
  element("text", { class: "label mid", transform: `translate(9 ${(top + height - bottom) / 2}) rotate(-90)` }, svg).textContent = "USD a month";
  const drawn = Object.fromEntries(table.baselines.map((each, index) => [each.title, each.ideal ? "ideal" : "d" + index]));
  const classes = titles.map((title) => title === now.main.title ? "plan" : drawn[title] ?? "copy");
  for (let index = lines[0].length - 1; index >= 0; index--) {
    const d = "M" + hours.map((perHour, step) => `${x(perHour).toFixed(1)} ${y(lines[step][index]).toFixed(1)}`).join("L");
    element("path", { class: "line " + classes[index], d }, svg);
  }
  if (at.perHour === null) return;
  const here = evaluate(table, at)[0].usd * at.perHour * HOURS;
  element("circle", { class: "mark now", cx: x(Math.min(Math.max(at.perHour, .1), 1e5)), cy: y(here), r: 6 }, svg);
}

// ---- Maps of layers and experts ----

function decoded(text) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  return new Uint16Array(bytes.buffer);
}

function mixed(stops, share) {
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1), index = Math.min(Math.floor(at), stops.length - 2);
  const parts = (hex) => [1, 3, 5].map((place) => parseInt(hex.slice(place, place + 2), 16));
  const [from, to] = [parts(stops[index]), parts(stops[index + 1])];
  return "rgb(" + from.map((value, place) => Math.round(value + (to[place] - value) * (at - index))).join(",") + ")";
}

function texture(context, kind, ratio) {
  const tile = document.createElement("canvas"), pen = tile.getContext("2d"), size = 7 * ratio;
  tile.width = tile.height = size;
  pen.lineWidth = (kind === "remote" ? 1.3 : 1) * ratio;
  pen.strokeStyle = kind === "remote" ? colours().stripe : colours().ground;
  pen.globalAlpha = kind === "remote" ? 1 : .75;
  for (const shift of [-size, 0, size]) {
    pen.moveTo(shift, size); pen.lineTo(shift + size, 0);
    if (kind === "gpu") { pen.moveTo(shift, 0); pen.lineTo(shift + size, size); }
  }
  pen.stroke();
  return context.createPattern(tile, "repeat");
}

const LEFT = 40, BELOW = 20;

class Grid {
  // `paint(context, layer, expert, x, y, width, height)` fills a cell, `describe(layer, expert)` says what is there.
  constructor(figure, paint, describe) {
    Object.assign(this, { figure, paint, describe, canvas: one("canvas", figure), reading: one(".reading", figure), cursor: null });
    this.layers = data.layers.length;
    this.experts = data.experts;
    this.across = this.experts >= this.layers; // whether experts go from left to right
    this.order = null;
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerdown", (event) => this.point(event));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    this.canvas.addEventListener("focus", () => this.move(this.cursor ?? [0, 0]));
    this.canvas.addEventListener("blur", () => this.move(null));
    this.canvas.addEventListener("pointerleave", () => { if (document.activeElement !== this.canvas) this.move(null); });
    new ResizeObserver(() => this.draw()).observe(this.canvas.parentElement);
  }
  get columns() { return this.across ? this.experts : this.layers; }
  get rows() { return this.across ? this.layers : this.experts; }
  cell([column, row]) {
    const [layer, place] = this.across ? [row, column] : [column, row];
    return [layer, this.order ? this.order[layer][place] : place];
  }
  size() {
    this.width = this.canvas.parentElement.clientWidth;
    const least = this.rows > 40 ? 5 : 7;
    this.cellHeight = Math.max(least, Math.min(this.columns > 40 || this.rows > 12 ? 16 : 26, Math.round(420 / this.rows)));
    this.cellWidth = (this.width - LEFT) / this.columns;
    return [this.width, this.rows * this.cellHeight + BELOW];
  }
  draw() {
    const [width, height] = this.size(), ratio = window.devicePixelRatio || 1, context = this.canvas.getContext("2d");
    if (width <= LEFT) return;
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.canvas.style.height = height + "px";
    context.scale(ratio, ratio);
    this.prepare?.(context, ratio);
    const gap = this.cellWidth > 6 && this.cellHeight > 6 ? 1 : 0;
    for (let row = 0; row < this.rows; row++) {
      for (let column = 0; column < this.columns; column++) {
        const from = LEFT + column * this.cellWidth, to = from + this.cellWidth;
        const x = gap ? from : Math.round(from * ratio) / ratio, end = gap ? to - gap : Math.round(to * ratio) / ratio;
        this.paint(context, ...this.cell([column, row]), x, row * this.cellHeight, end - x, this.cellHeight - gap);
      }
    }
    this.labels(context);
    if (this.cursor) this.outline(context);
  }
  labels(context) {
    context.font = "11px system-ui, sans-serif";
    context.fillStyle = colours().soft;
    const every = (count, room) => [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128].find((step) => count / step <= room) ?? 256;
    const name = (index, isLayer) => isLayer ? data.layers[index] : this.order ? index + 1 : index;
    const rowStep = every(this.rows, this.rows * this.cellHeight / 15), columnStep = every(this.columns, (this.width - LEFT) / 34);
    context.textAlign = "right";
    for (let row = 0; row < this.rows; row += rowStep) context.fillText(name(row, this.across), LEFT - 6, row * this.cellHeight + this.cellHeight / 2 + 4);
    context.textAlign = "center";
    for (let column = 0; column < this.columns; column += columnStep) {
      context.fillText(name(column, !this.across), LEFT + (column + .5) * this.cellWidth, this.rows * this.cellHeight + 14);
    }
  }
  outline(context) {
    const [column, row] = this.cursor;
    const place = [LEFT + column * this.cellWidth - 1, row * this.cellHeight - 1, this.cellWidth + 2, this.cellHeight + 2];
    context.lineWidth = 4; context.strokeStyle = colours().ground; context.strokeRect(...place);
    context.lineWidth = 2; context.strokeStyle = colours().text; context.strokeRect(...place);
  }
  move(cursor) {
    this.cursor = cursor;
    this.reading.textContent = cursor ? this.describe(...this.cell(cursor)) : this.reading.dataset.rest;
    this.draw();
  }
  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - LEFT) / this.cellWidth), row = Math.floor((event.clientY - box.top) / this.cellHeight);
    const inside = column >= 0 && column < this.columns && row >= 0 && row < this.rows;
    if (inside && (!this.cursor || this.cursor[0] !== column || this.cursor[1] !== row)) this.move([column, row]);
  }
  key(event) {
    const [column, row] = this.cursor ?? [0, 0];
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], PageUp: [0, -8], PageDown: [0, 8], Home: [-column, 0], End: [this.columns, 0] };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const within = (value, count) => Math.min(Math.max(value, 0), count - 1);
    this.move([within(column + steps[event.key][0], this.columns), within(row + steps[event.key][1], this.rows)]);
  }
}

function byUse(shares) {
  return data.layers.map((_, layer) => Array.from({ length: data.experts }, (_, expert) => expert)
    .sort((a, b) => shares[layer * data.experts + b] - shares[layer * data.experts + a] || a - b));
}

function setUpMaps() {
  const grids = [];
  const uses = (data.uses ?? []).map((use) => ({ title: use.title, most: use.most, shares: decoded(use.shares) }));
  const share = (use, layer, expert) => use.shares[layer * data.experts + expert] / 65535 * use.most;
  const ratio = (use, layer, expert) => share(use, layer, expert) * data.experts / data.top_k;
  const used = (use, layer, expert) => "used by " + percent(share(use, layer, expert)) + " of " + use.title + ", " + digits(ratio(use, layer, expert), 2) + " × even use";
  const order = uses.length ? byUse(uses[0].shares) : null;
  const name = (layer, expert) => "Layer " + data.layers[layer] + ", expert " + expert + ": ";
  const ordered = (figure, grid) => {
    const box = one("[data-order]", figure);
    const apply = () => { grid.order = box?.checked ? order : null; grid.draw(); };
    box?.addEventListener("change", apply);
    apply();
  };

  const activation = one("#activation figure");
  if (activation) {
    const choice = one("select", activation);
    const now = () => uses[choice ? choice.value : 0];
    const grid = new Grid(activation, (context, layer, expert, x, y, width, height) => {
      const value = ratio(now(), layer, expert);
      context.fillStyle = mixed(colours().ramp, value > 0 ? .5 + Math.log2(value) / data.octaves / 2 : 0);
      context.fillRect(x, y, width, height);
    }, (layer, expert) => name(layer, expert) + used(now(), layer, expert) + (now() === uses[0] ? "." : "; " + used(uses[0], layer, expert) + "."));
    choice?.addEventListener("change", () => grid.draw());
    ordered(activation, grid);
    grids.push(grid);
  }

  const placement = one("#placement figure");
  if (placement) {
    const owners = decoded(data.placement.owners);
    const kinds = (owner) => owner === 0 ? "gpu" : owner === 1 ? "cpu" : "remote";
    let textures = {};
    const grid = new Grid(placement, (context, layer, expert, x, y, width, height) => {
      const kind = kinds(owners[layer * data.experts + expert]);
      context.fillStyle = colours()[kind];
      context.fillRect(x, y, width, height);
      if (textures[kind]) { context.fillStyle = textures[kind]; context.fillRect(x, y, width, height); }
    }, (layer, expert) => {
      const owner = owners[layer * data.experts + expert], at = data.placement.layers[layer], kind = kinds(owner);
      const where = kind === "gpu" ? "on the GPU of the main function" : kind === "cpu" ? "in CPU memory of the main function"
        : "remote, function " + (owner - 1) + " of " + at.functions + " of this layer, " + count(at.memory_mb) + " MB"
          + (at.replicas > 1 ? ", " + at.replicas + " replicas" : "") + ", " + dollars(at.usd * 1e6) + " for a million requests to the layer";
      return name(layer, expert) + where + (uses.length ? "; " + used(uses[0], layer, expert) : "") + ".";
    });
    grid.prepare = (context, ratio) => {
      textures = { remote: texture(context, "remote", ratio), gpu: texture(context, "gpu", ratio) };
      for (const each of Object.values(textures)) each.setTransform(new DOMMatrix().scale(1 / ratio));
    };
    ordered(placement, grid);
    grids.push(grid);
  }
  const redraw = () => grids.forEach((grid) => grid.draw());
  dark.addEventListener("change", redraw);
  for (const [event, state] of [["beforeprint", true], ["afterprint", false]]) addEventListener(event, () => { printing = state; redraw(); });
}

if (typeof module === "undefined") {
  setUpMaps();
  if (data.table) setUpWhatIf(data.table);
}
