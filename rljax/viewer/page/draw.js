"use strict";
// Elements, curves and forests. Text comes in as text nodes alone: what a model wrote is never taken for markup.

const RUN_COLOURS = ["#1f6feb", "#d9480f", "#2b8a3e", "#ae3ec9", "#0b7285", "#a67c00"];

function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  for (const child of children.flat()) {
    if (child === null || child === undefined) continue;
    node.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return node;
}

function el(name, attributes, ...children) {
  return put(document.createElement(name), attributes, children);
}

function svg(name, attributes, ...children) {
  return put(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

const isNumber = (x) => typeof x === "number" && Number.isFinite(x);

function short(x) {
  if (!isNumber(x)) return x === null || x === undefined ? "–" : String(x);
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (size >= 1e5 || size < 1e-3) return x.toExponential(1);
  return String(+x.toPrecision(3));
}

// Curves of one metric, one a run. `series`: {name, colour, points: [[step, value]]}.
function lineChart(metric, series) {
  const [width, height, left, bottom] = [320, 130, 56, 18];
  const all = series.flatMap((one) => one.points);
  const readout = el("div", { class: "readout" });
  if (!all.length) return el("div", {}, readout);

  const xs = all.map((p) => p[0]);
  const ys = all.map((p) => p[1]);
  let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
  let [y0, y1] = [Math.min(...ys), Math.max(...ys)];
  if (x0 === x1) x1 = x0 + 1;
  if (y0 === y1) [y0, y1] = [y0 - (Math.abs(y0) * 0.1 || 1), y1 + (Math.abs(y1) * 0.1 || 1)];
  const X = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - 8);
  const Y = (y) => 6 + (1 - (y - y0) / (y1 - y0)) * (height - bottom - 10);

  const last = series.filter((one) => one.points.length);
  const say = (picked) => {
    readout.replaceChildren();
    for (const [one, point] of picked) {
      readout.append(
        el("span", {}, mark(one.colour), `${series.length > 1 ? one.name + " " : ""}${short(point[1])} at ${point[0]}  `));
    }
  };
  say(last.map((one) => [one, one.points[one.points.length - 1]]));

  const cursor = svg("line", { class: "axis", y1: 4, y2: height - bottom, x1: -9, x2: -9 });
  const words = last.map((one) => `${one.name}: ${short(one.points[0][1])} to ${short(one.points[one.points.length - 1][1])}`);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${metric}. ${words.join("; ")}` },
    svg("line", { class: "axis", x1: left, x2: width - 8, y1: height - bottom, y2: height - bottom }),
    svg("line", { class: "axis", x1: left, x2: left, y1: 4, y2: height - bottom }),
    svg("text", { x: left - 4, y: 12, "text-anchor": "end" }, short(y1)),
    svg("text", { x: left - 4, y: height - bottom, "text-anchor": "end" }, short(y0)),
    svg("text", { x: left, y: height - 4 }, x0),
    svg("text", { x: width - 8, y: height - 4, "text-anchor": "end" }, x1),
    cursor);
  for (const one of last) {
    const path = one.points.map((p, i) => `${i ? "L" : "M"}${X(p[0]).toFixed(1)} ${Y(p[1]).toFixed(1)}`).join("");
    drawing.append(svg("path", { d: path, fill: "none", stroke: one.colour, "stroke-width": 1.6 }));
    if (one.points.length === 1) drawing.append(svg("circle", { cx: X(one.points[0][0]), cy: Y(one.points[0][1]), r: 3, fill: one.colour }));
  }
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const step = x0 + (((event.clientX - box.left) / box.width) * width - left) / (width - left - 8) * (x1 - x0);
    const picked = last.map((one) =>
      [one, one.points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a))]);
    cursor.setAttribute("x1", X(picked[0][1][0]));
    cursor.setAttribute("x2", X(picked[0][1][0]));
    say(picked);
  });
  return el("div", {}, drawing, readout);
}

function mark(colour) {
  const dot = el("span", { class: "dot", "aria-hidden": "true" });
  dot.style.background = colour;
  return dot;
}

// ---- colours of numbers: both scales are told apart without red and green ----

function mix(a, b, share) {
  const part = (i) => Math.round(a[i] + (b[i] - a[i]) * share);
  return `rgb(${part(0)}, ${part(1)}, ${part(2)})`;
}

const PALE = [247, 247, 244];
const diverging = (x) => (x >= 0 ? mix(PALE, [67, 147, 222], Math.min(1, x)) : mix(PALE, [235, 130, 50], Math.min(1, -x)));
const sequential = (x) => mix(PALE, [196, 90, 190], Math.min(1, Math.max(0, x)));

function rewardColour(value, low, high) {
  if (!isNumber(value)) return "#9aa3ad";
  // All alike: no side of the scale.
  if (high <= low) return "#8a97a8";
  const share = (value - low) / (high - low);
  const middle = [200, 200, 196];
  return share < 0.5 ? mix([235, 130, 50], middle, 2 * share) : mix(middle, [67, 147, 222], 2 * share - 1);
}

// ---- a forest ----

function describeBranch(branch, record) {
  const whole = `sample ${record.sample}, reward ${short(branch.reward)}, ${(record.tokens || []).length} tokens`;
  if (branch.parent === null) return whole;
  const score = isNumber(branch.fork_score) && branch.fork_score !== 0 ? `, fork score ${short(branch.fork_score)}` : "";
  return `${whole}, leaves another one at token ${branch.stretches[0].start}${score}`;
}

// Lanes from top to bottom, tokens from left to right. `select(sample)` is called with the place of a record.
function forestDrawing(forest, records, chosen, select) {
  const [lane, left, right, width] = [40, 64, 96, 900];
  const height = 26 + lane * forest.branches.length;
  const X = (token) => left + (token / Math.max(1, forest.length)) * (width - left - right);
  const Y = (row) => 30 + lane * row;
  const rewards = records.map((record) => record.reward).filter(isNumber);
  const [low, high] = [Math.min(...rewards), Math.max(...rewards)];
  const laneOf = new Map(forest.branches.map((branch) => [branch.sample, branch.lane]));
  const forks = forest.branches.filter((branch) => branch.parent !== null).length;

  const drawing = svg("svg", {
    viewBox: `0 0 ${width} ${height}`, role: "group", class: "forest",
    "aria-label": `Forest of ${records.length} samples, ${forks} of them forks, up to ${forest.length} tokens`,
  },
    svg("text", { x: left, y: 12 }, "token 0"),
    svg("text", { x: width - right, y: 12, "text-anchor": "end" }, forest.length));

  for (const branch of forest.branches) {
    const record = records[branch.sample];
    const y = Y(branch.lane);
    const first = branch.stretches[0];
    const last = branch.stretches[branch.stretches.length - 1];
    if (branch.parent !== null) {
      const x = X(first.start);
      drawing.append(svg("path", { class: "link", d: `M${x} ${Y(laneOf.get(branch.parent))} V${y}` }));
      drawing.append(svg("circle", { cx: x, cy: Y(laneOf.get(branch.parent)), r: 3.5, fill: "#c026d3" }));
      // Room for the score is left of the bar; at the very beginning the lane's own name stands there.
      if (isNumber(branch.fork_score) && branch.fork_score !== 0) {
        drawing.append(svg("text", { x: x + 3, y: y - 8 }, `fork ${short(branch.fork_score)}`));
      }
    }

    const group = svg("g", {
      class: "branch", tabindex: 0, role: "button", "data-sample": branch.sample,
      "aria-pressed": branch.sample === chosen ? "true" : "false", "aria-label": describeBranch(branch, record),
      onclick: () => select(branch.sample),
      onkeydown: (event) => {
        if (event.key === "Enter" || event.key === " ") {
          event.preventDefault();
          select(branch.sample);
        }
      },
    });
    group.append(svg("rect", { class: "frame", x: 2, y: y - 11, width: width - 4, height: 22, rx: 5 }));
    group.append(svg("text", { x: 8, y: y + 4 }, `#${record.sample}`));
    for (const stretch of branch.stretches) {
      const bar = svg("rect", {
        x: X(stretch.start), y: y - 5, width: Math.max(1.5, X(stretch.end) - X(stretch.start) - 1), height: 10,
        fill: rewardColour(stretch.value, low, high),
      }, svg("title", {}, `tokens ${stretch.start} to ${stretch.end}: value ${short(stretch.value)} of ${stretch.leaves} leaves`));
      group.append(bar);
      if (branch.stretches.length > 1 && X(stretch.end) - X(stretch.start) > 34) {
        group.append(svg("text", { x: (X(stretch.start) + X(stretch.end)) / 2, y: y + 15, "text-anchor": "middle" }, `v ${short(stretch.value)}`));
      }
    }
    spans(record, records).forEach(([kind, from, to]) => {
      const start = Math.max(from, first.start);
      if (to <= start) return;
      group.append(svg("rect", {
        class: `span-${kind}`, x: X(start), y: y - 5, width: Math.max(1.5, X(to) - X(start)), height: 10,
        fill: { observation: "var(--panel)", injected: "#c2410c", suppressed: "#7c3aed" }[kind],
        "fill-opacity": kind === "observation" ? 0.72 : 1,
      }, svg("title", {}, kind)));
    });
    group.append(svg("text", { x: X(last.end) + 6, y: y + 4 }, record.error ? "failed" : `r ${short(branch.reward)}`));
    drawing.append(group);
  }
  return drawing;
}

// [kind, start, end] of tokens that the policy did not choose: what a fork was given, or denied to begin with, and all
// else that was not sampled, which the environment has said. A fork holds what its ancestors were given too.
function spans(record, records) {
  const given = new Set();
  for (let one = record; one && isNumber(one.parent); one = one.parent < records.indexOf(one) ? records[one.parent] : null) {
    if (one.intervention === "injected" || !one.per_token) given.add(one.fork_index);
  }
  const found = (record.forced || []).map(([start, end]) => [given.has(start) ? "injected" : "observation", start, end]);
  if (record.intervention === "suppressed") found.push(["suppressed", record.fork_index, record.fork_index + 1]);
  return found;
}
