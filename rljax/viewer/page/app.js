"use strict";
// The views. What is shown is named by the part of the address behind #, so that a link leads to the same place.

const PINNED = [
  /^rollout\/reward_mean$/, /^eval\/avg@/, /^rollout\/entropy$/, /^rollout\/no_signal_share$/, /^rollout\/truncated_share$/,
  /^rollout\/length_mean$/, /^loss\/grad_norm$/, /^loss\/approx_kl$/, /^rollout\/logprob_gap_max$/, /^critic\/explained_variance$/,
];
const VIEWS = ["overview", "rollouts", "compare", "search"];
const COLOURS = {
  none: "no colour", advantage: "advantage", entropy: "entropy (nats)", gap: "log-prob gap (nats)", ratio: "ratio", logprob: "log-prob (nats)",
  value: "value",
};
const POLL_MS = 2000;

const told = document.getElementById("told") ? JSON.parse(document.getElementById("told").textContent) : null;
const main = document.getElementById("main");
const status_ = document.getElementById("status");
let about = { runs: [], texts: {}, searches: {} };
let active = null; // the rollouts that keys move in
let drawn = 0; // counts views, so that an answer that comes late draws nothing

async function ask(path, params) {
  const query = new URLSearchParams(Object.entries(params || {}).map(([k, v]) => [k, String(v)]));
  query.sort();
  if (told) {
    const found = told[`${path}?${query}`];
    if (found === undefined) throw new Error("this file does not hold these rollouts");
    return found;
  }
  const answer = await fetch(`api/${path}?${query}`);
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}

function place() {
  return Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
}

function go(changes) {
  const query = new URLSearchParams({ ...place(), ...changes });
  history.replaceState(null, "", `#${query}`);
}

function tell(text) {
  status_.textContent = text;
}

// ---- the frame ----

function showRuns() {
  const list = document.getElementById("runs");
  list.replaceChildren(...about.runs.map((run, i) => {
    const progress = run.total ? `step ${run.step} of ${run.total}` : `step ${run.step}`;
    return el("li", { title: run.path }, mark(RUN_COLOURS[i % RUN_COLOURS.length]), run.name,
      el("span", { class: "soft" }, ` ${run.algorithm ? run.algorithm + ", " : ""}${progress}${run.is_live ? ", live" : ""}`));
  }));
  document.title = `${about.runs.map((run) => run.name).join(", ")} – rljax view`;
}

async function show(view) {
  go({ view });
  const mine = ++drawn;
  for (const tab of document.querySelectorAll("[role=tab]")) {
    const isChosen = tab.dataset.view === view;
    tab.setAttribute("aria-selected", String(isChosen));
    tab.tabIndex = isChosen ? 0 : -1;
  }
  main.setAttribute("aria-labelledby", `tab-${view}`);
  active = null;
  const page = el("div", {});
  try {
    await { overview: showOverview, rollouts: showRollouts, compare: showCompare, search: showSearch }[view](page);
  } catch (error) {
    page.append(el("p", { class: "error" }, error.message));
  }
  if (mine === drawn) {
    main.replaceChildren(page);
    main.dataset.shown = view;
  }
}

// ---- overview: alarms and curves ----

async function showOverview(page) {
  page.append(alarms());
  const columns = await Promise.all(about.runs.map((_, run) => ask("metrics", { run })));
  const names = [...new Set(columns.flatMap((c) => Object.keys(c)))].filter((name) => name !== "step").sort();
  if (!names.length) {
    page.append(el("p", {}, "No step has been written yet."));
    return;
  }

  const pinned = PINNED.flatMap((pattern) => names.filter((name) => pattern.test(name)));
  page.append(el("h2", {}, "Look at these first"), charts(pinned, columns));
  const rooms = [...new Set(names.map((name) => name.split("/")[0]))];
  for (const room of rooms) {
    const own = names.filter((name) => name.split("/")[0] === room);
    const box = el("details", {}, el("summary", {}, `${room} (${own.length})`));
    box.addEventListener("toggle", () => {
      if (box.open && box.children.length === 1) box.append(charts(own, columns));
    });
    page.append(box);
  }
}

function alarms() {
  const box = el("section", { "aria-label": "Alarms", id: "alarms" });
  for (const run of about.runs) {
    for (const alarm of run.alarms) {
      box.append(el("div", { class: "alarm", role: "note" }, el("strong", {}, alarm.name), ` in ${run.name}, step ${alarm.step}. `,
        alarm.text, " ", el("span", { class: "soft" }, alarm.remedy, " ", el("code", {}, alarm.metric))));
    }
  }
  if (!box.children.length) box.append(el("p", { class: "soft" }, "No alarm in the last lines of metrics."));
  return box;
}

function charts(names, columns) {
  return el("div", { class: "charts" }, names.map((name) => {
    const series = columns.map((c, i) => ({
      name: about.runs[i].name, colour: RUN_COLOURS[i % RUN_COLOURS.length],
      points: (c[name] || []).map((value, k) => [c.step[k], value]).filter((p) => isNumber(p[1])),
    }));
    const text = about.texts[name];
    const id = `tip-${name}`;
    const tip = el("div", { class: "tip", role: "tooltip", id },
      el("p", {}, text ? text.meaning || "" : "The documentation does not explain this one."),
      text && text.healthy ? el("p", { class: "soft" }, "Healthy: ", text.healthy) : null);
    return el("section", { class: "chart", tabindex: 0, "aria-label": name, "aria-describedby": id, "data-metric": name },
      el("h3", {}, name), lineChart(name, series), tip);
  }));
}

// ---- rollouts: steps, prompts, the forest, the tokens ----

class Browser {
  // `key` is put behind the names in the address, so that two browsers stand side by side.
  constructor(key, followed) {
    this.key = key;
    this.followed = followed;
    this.node = el("div", {});
    this.colour = place().colour || "advantage";
  }

  get(name) {
    return place()[name + this.key];
  }

  set(changes) {
    go(Object.fromEntries(Object.entries(changes).map(([name, value]) => [name + this.key, value])));
  }

  async open() {
    const runs = about.runs.map((run, i) => [i, run]).filter(([, run]) => run.rollouts.length);
    if (!runs.length) {
      this.node.replaceChildren(el("p", {}, "No rollouts have been written yet."));
      return;
    }
    const asked = Number(this.get("run"));
    this.run = runs.some(([i]) => i === asked) ? asked : runs[0][0];
    this.steps = about.runs[this.run].rollouts;
    const wanted = `${this.get("step")}:${this.get("untrained") === "1"}`;
    this.at = this.steps.findIndex(([step, untrained]) => `${step}:${untrained}` === wanted);
    if (this.at < 0) this.at = this.key === "2" || this.get("step") !== undefined || !this.first ? this.steps.length - 1 : 0;
    await this.openStep();
  }

  where() {
    const [step, untrained] = this.steps[this.at];
    return { run: this.run, step, untrained: untrained ? 1 : 0 };
  }

  async openStep() {
    this.set(this.where());
    this.groups = await ask("groups", this.where());
    const asked = Number(this.get("group"));
    this.group = this.groups.some((g) => g.group === asked) ? asked : this.groups[0]?.group;
    if (this.group === undefined) {
      this.node.replaceChildren(this.bar(), el("p", {}, "No rollout of this step can be read."));
      return;
    }
    await this.openGroup(this.group);
  }

  async openGroup(group, sample) {
    this.group = group;
    this.set({ group });
    this.found = await ask("group", { ...this.where(), group });
    const asked = sample ?? Number(this.get("sample") ?? 0);
    this.sample = asked < this.found.records.length ? asked : 0;
    this.set({ sample: this.sample });
    this.draw();
    if (this.followed) this.followed(this);
  }

  async openPrompt(id) {
    const same = this.groups.find((g) => g.prompt_id === id);
    if (same && same.group !== this.group) await this.openGroup(same.group);
  }

  bar() {
    const run = el("select", { "aria-label": "Run" }, about.runs.map((r, i) => el("option", { value: i, selected: i === this.run }, r.name)));
    run.addEventListener("change", () => this.guard(async () => {
      this.set({ run: run.value });
      await this.open();
    }));
    const step = el("select", { "aria-label": "Step" }, this.steps.map(([number, untrained], i) =>
      el("option", { value: i, selected: i === this.at }, `step ${number}${untrained ? ", left out" : ""}`)));
    step.addEventListener("change", () => this.guard(() => this.moveStep(Number(step.value) - this.at)));
    return el("div", { class: "bar" }, run,
      el("button", { "aria-label": "Step before", onclick: () => this.guard(() => this.moveStep(-1)) }, "‹"), step,
      el("button", { "aria-label": "Step after", onclick: () => this.guard(() => this.moveStep(1)) }, "›"));
  }

  async guard(action) {
    try {
      await action();
    } catch (error) {
      tell(error.message);
    }
  }

  async moveStep(by) {
    const prompt = this.groups?.find((g) => g.group === this.group)?.prompt_id;
    const next = Math.max(0, Math.min(this.steps.length - 1, this.at + by));
    if (next === this.at) return;
    this.at = next;
    this.set({ ...this.where() });
    await this.openStep();
    await this.openPrompt(prompt);
  }

  async moveGroup(by) {
    const at = this.groups.findIndex((g) => g.group === this.group);
    const next = this.groups[at + by];
    if (next) await this.openGroup(next.group, 0);
  }

  moveSample(by) {
    const lanes = this.found.forest.branches.map((branch) => branch.sample);
    const next = lanes[lanes.indexOf(this.sample) + by];
    if (next !== undefined) this.choose(next);
  }

  choose(sample) {
    this.sample = sample;
    this.set({ sample });
    this.draw();
    this.node.querySelector(`.branch[data-sample="${sample}"]`)?.focus();
  }

  cycle() {
    const known = this.kinds();
    this.colour = known[(known.indexOf(this.colour) + 1) % known.length];
    go({ colour: this.colour });
    this.draw();
    tell(`Tokens by ${COLOURS[this.colour]}`);
  }

  draw() {
    const inside = this.node.querySelector(".groups")?.scrollTop || 0;
    const record = this.found.records[this.sample];
    const list = el("ul", { class: "groups", role: "listbox", "aria-label": "Prompts of the step", tabindex: 0 }, this.groups.map((g) =>
      el("li", {
        role: "option", "aria-selected": String(g.group === this.group), onclick: () => this.guard(() => this.openGroup(g.group, 0)),
      },
        el("span", { class: "text" }, el("bdi", {}, g.prompt)),
        el("span", { class: "soft" }, groupWords(g)))));
    list.addEventListener("keydown", (event) => {
      const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!by) return;
      event.preventDefault();
      this.guard(async () => {
        await this.moveGroup(by);
        this.node.querySelector(".groups").focus();
      });
    });

    const right = el("div", {},
      el("h2", {}, "Prompt"), el("pre", { class: "text-block prompt" }, this.found.prompt),
      el("h2", {}, "Forest"),
      el("p", { class: "soft" }, "Bars are tokens, coloured from the lowest reward of the group (orange) to the highest (blue); v is the ",
        "mean reward of the leaves behind a stretch. Pale: observations. Brown: injected. Violet: suppressed."),
      el("div", { class: "drawing" }, forestDrawing(this.found.forest, this.found.records, this.sample, (s) => this.choose(s))),
      el("h2", {}, `Sample #${record.sample}`), facts(record), this.tokens(record));
    this.node.replaceChildren(this.bar(), el("div", { class: "browser" }, list, right));
    list.scrollTop = inside;
    list.querySelector("[aria-selected=true]")?.scrollIntoView({ block: "nearest" });
  }

  kinds() {
    const columns = this.found.records[this.sample].per_token;
    return columns ? Object.keys(COLOURS).filter((kind) => kind === "none" || numbers(kind, this.found.records[this.sample])) : ["none"];
  }

  tokens(record) {
    const columns = record.per_token;
    if (!columns) {
      return el("div", {}, el("pre", { class: "text-block" }, record.completion),
        el("p", { class: "soft" }, "Train with --config.log.per_token to see tokens one by one, coloured."));
    }

    const kinds = this.kinds();
    const kind = kinds.includes(this.colour) ? this.colour : "none";
    const choice = el("select", { "aria-label": "Colour of tokens" }, kinds.map((k) => el("option", { value: k, selected: k === kind }, COLOURS[k])));
    choice.addEventListener("change", () => {
      this.colour = choice.value;
      go({ colour: this.colour });
      this.draw();
    });
    const values = numbers(kind, record);
    const { paint, legend } = scaleOf(kind, this.found.records);
    const facts = el("div", { class: "facts", role: "status", "aria-live": "polite" }, "Point at a token, or move with the arrow keys.");
    const box = el("div", { class: "tokens", tabindex: 0, role: "group", "aria-label": `Tokens of sample ${record.sample}, coloured by ${COLOURS[kind]}` });

    const kindAt = new Array(columns.text.length).fill(null);
    for (const [name, from, to] of spans(record, this.found.records)) kindAt.fill(name === "observation" ? "seen" : name, from, to);
    let turn = null;
    const nodes = columns.text.map((text, i) => {
      // What the environment says stands behind the turn that it answers.
      if (kindAt[i] !== "seen" && columns.turn[i] !== turn && columns.turn.some((t) => t !== columns.turn[0])) {
        turn = columns.turn[i];
        box.append(el("span", { class: "turn" }, `turn ${turn}`));
      }
      if (kindAt[i] === "seen" && kindAt[i - 1] !== "seen") box.append(el("span", { class: "turn" }, "observation"));
      const classes = ["token", kindAt[i], i === record.fork_index && record.parent !== undefined ? "fork" : null];
      const node = el("span", { title: factsOf(record, i) }, text === "" ? `⟨${record.tokens[i]}⟩` : text);
      if (text === "") classes.push("unwritten");
      if (values && isNumber(values[i]) && kindAt[i] !== "seen") {
        classes.push("coloured");
        node.style.background = paint(values[i]);
      }
      node.className = classes.filter(Boolean).join(" ");
      node.addEventListener("pointerenter", () => { facts.textContent = factsOf(record, i); });
      node.addEventListener("click", () => pick(i));
      box.append(node);
      return node;
    });

    let at = -1;
    const pick = (i) => {
      if (i < 0 || i >= nodes.length) return;
      nodes[at]?.classList.remove("chosen");
      at = i;
      nodes[at].classList.add("chosen");
      nodes[at].scrollIntoView({ block: "nearest" });
      facts.textContent = factsOf(record, at);
    };
    box.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (by) {
        event.preventDefault();
        pick(at + by);
      }
    });
    return el("div", {}, el("div", { class: "bar" }, el("label", {}, "Colour "), choice, legend), box, facts);
  }
}

function groupWords(g) {
  const words = [`${g.samples} samples`, `reward ${short(g.reward)}`];
  if (g.low !== null && g.low !== g.high) words.push(`${short(g.low)} to ${short(g.high)}`);
  else if (g.low !== null) words.push("no signal");
  if (g.truncated) words.push(`${g.truncated} cut off`);
  if (g.failed) words.push(`${g.failed} failed`);
  return words.join(", ");
}

function facts(record) {
  const cells = [
    ["reward", short(record.reward)], ["shaped", short(record.shaped_reward)], ["advantage", short(record.advantage)],
    ["tokens", (record.tokens || []).length], ["ended by", record.finish_reason],
    ...Object.entries(record.components || {}).map(([name, value]) => [name, short(value)]),
  ];
  return el("div", {},
    el("table", {}, el("tbody", {},
      el("tr", {}, cells.map(([name]) => el("th", { scope: "col" }, name))),
      el("tr", {}, cells.map(([, value]) => el("td", { class: "number" }, value))))),
    record.error ? el("p", { class: "error" }, record.error) : null,
    Object.keys(record.columns || {}).length
      ? el("details", {}, el("summary", {}, "The data row"), el("pre", { class: "text-block" }, JSON.stringify(record.columns, null, 2))) : null);
}

// What tokens of a record are coloured by; null where it is not recorded.
function numbers(kind, record) {
  const columns = record.per_token;
  if (!columns || kind === "none") return null;
  const sampled = (values) => values.map((value, i) => (columns.sampled[i] ? value : null));
  if (kind === "logprob") return sampled(record.logprobs);
  if (kind === "gap" || kind === "ratio") {
    if (!columns.log_ratio) return null;
    return columns.log_ratio.map((value, i) => {
      if (!columns.trained[i] || !isNumber(value)) return null;
      return kind === "gap" ? Math.abs(value) : Math.exp(value);
    });
  }
  return columns[kind] ? sampled(columns[kind]) : null;
}

// One scale for all samples of a group, so that they can be compared.
function scaleOf(kind, records) {
  if (kind === "none") return { paint: () => "", legend: null };
  const centre = kind === "ratio" ? 1 : 0;
  const all = records.flatMap((record) => numbers(kind, record) || []).filter(isNumber).map((x) => Math.abs(x - centre));
  const most = Math.max(...all, 0);
  if (!most) return { paint: () => "", legend: el("span", { class: "legend" }, `${short(centre)} on all tokens of the group`) };
  const isSigned = kind === "advantage" || kind === "ratio" || kind === "value";
  const paint = isSigned ? (x) => diverging((x - centre) / most) : (x) => sequential(Math.abs(x) / most);
  const low = isSigned ? centre - most : 0;
  const high = kind === "logprob" ? -most : centre + most;
  const bar = svg("svg", { viewBox: "0 0 120 12", "aria-hidden": "true" });
  for (let i = 0; i < 24; i++) bar.append(svg("rect", { x: i * 5, y: 0, width: 5, height: 12, fill: paint(low + ((high - low) * (i + 0.5)) / 24) }));
  return { paint, legend: el("span", { class: "legend" }, short(low), bar, short(high)) };
}

function factsOf(record, i) {
  const columns = record.per_token;
  const words = [`token ${i} (id ${record.tokens[i]})`];
  if (!columns.sampled[i]) words.push("not sampled");
  for (const kind of ["advantage", "logprob", "entropy", "gap", "ratio", "value"]) {
    const value = numbers(kind, record)?.[i];
    if (isNumber(value)) words.push(`${kind} ${short(value)}`);
  }
  return words.join("  ·  ");
}

async function showRollouts(page) {
  const browser = new Browser("");
  active = browser;
  await browser.open();
  page.append(browser.node);
}

async function showCompare(page) {
  const right = new Browser("2");
  const left = new Browser("1", (from) => {
    const prompt = from.groups.find((g) => g.group === from.group)?.prompt_id;
    if (right.groups) right.guard(() => right.openPrompt(prompt));
  });
  // Without a word on it: the first step beside the last one, or the first run beside the second.
  left.first = about.runs.length === 1;
  if (about.runs.length > 1 && right.get("run") === undefined) right.set({ run: 1 });
  active = left;
  await right.open();
  await left.open();
  page.append(el("p", { class: "soft" }, "The right side follows the prompt of the left one where its step has it."),
    el("div", { class: "pair" }, el("section", { "aria-label": "Left" }, left.node), el("section", { "aria-label": "Right" }, right.node)));
}

// ---- search over all steps ----

async function showSearch(page) {
  const here = place();
  const run = Number(here.run || 0);
  const search = here.search || "gap";
  const found = await ask("find", { run, search });
  const runs = el("select", { "aria-label": "Run" }, about.runs.map((r, i) => el("option", { value: i, selected: i === run }, r.name)));
  const kinds = el("select", { "aria-label": "Search" }, Object.entries(about.searches).map(([k, words]) => el("option", { value: k, selected: k === search }, words)));
  for (const select of [runs, kinds]) {
    select.addEventListener("change", () => {
      go({ run: runs.value, search: kinds.value });
      show("search");
    });
  }
  page.append(el("div", { class: "bar" }, runs, kinds,
    el("span", { class: "soft", id: "pending" }, found.pending ? `${found.pending} files of rollouts are still to be read` : "all steps")));
  if (!found.found.length) {
    const why = search === "gap" ? "None: the trainer's log-probs are recorded with --config.log.per_token." : "None.";
    page.append(el("p", {}, why));
    return;
  }
  const head = ["step", "sample", "reward", "advantage", "tokens", "largest gap", "error"];
  page.append(el("table", {}, el("thead", {}, el("tr", {}, head.map((name) => el("th", { scope: "col" }, name)), el("th", {}, "open"))),
    el("tbody", {}, found.found.map((row) => el("tr", {},
      el("td", { class: "number" }, row.step), el("td", { class: "number" }, row.sample), el("td", { class: "number" }, short(row.reward)),
      el("td", { class: "number" }, short(row.advantage)), el("td", { class: "number" }, row.tokens), el("td", { class: "number" }, short(row.gap)),
      el("td", {}, row.error ? el("span", { class: "error" }, row.error) : ""),
      el("td", {}, el("button", {
        "aria-label": `Open sample ${row.sample} of step ${row.step}`,
        onclick: () => {
          go({ run, step: row.step, untrained: row.untrained, group: row.prompts, sample: row.sample });
          show("rollouts");
        },
      }, "open")))))));
}

// ---- keys and life ----

document.getElementById("tabs").addEventListener("click", (event) => {
  const view = event.target.dataset.view;
  if (view) show(view);
});
document.getElementById("tabs").addEventListener("keydown", (event) => {
  const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!by) return;
  const next = VIEWS[(VIEWS.indexOf(event.target.dataset.view) + by + VIEWS.length) % VIEWS.length];
  show(next);
  document.getElementById(`tab-${next}`).focus();
});
document.getElementById("help").addEventListener("click", () => document.getElementById("keys").showModal());
document.addEventListener("keydown", (event) => {
  const isTyping = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey || document.getElementById("keys").open) return;
  if (event.key === "?") document.getElementById("keys").showModal();
  if (VIEWS[Number(event.key) - 1]) show(VIEWS[Number(event.key) - 1]);
  if (!active || !active.found) return;
  const actions = {
    "[": () => active.moveStep(-1), "]": () => active.moveStep(1), k: () => active.moveGroup(-1), j: () => active.moveGroup(1),
    p: () => active.moveSample(-1), n: () => active.moveSample(1), c: () => active.cycle(),
  };
  if (actions[event.key]) active.guard(async () => actions[event.key]());
});

async function refresh() {
  about = await ask("runs", {});
  showRuns();
}

async function follow(last) {
  let isLost = false;
  for (;;) {
    try {
      const now = JSON.stringify(await ask("stamp", {}));
      if (now !== last) {
        await refresh();
        // Rollouts stay as they are while they are read; the list of steps grows.
        if (main.dataset.shown === "overview") await keepingPlace(() => show("overview"));
        else if (active && active.steps) active.steps = about.runs[active.run].rollouts;
      }
      last = now;
      if (isLost) tell("");
      isLost = false;
    } catch (error) {
      isLost = true;
      tell("The viewer does not answer; is rljax view still running?");
    }
    await new Promise((done) => setTimeout(done, POLL_MS));
  }
}

async function keepingPlace(draw) {
  const [top, open] = [scrollY, [...main.querySelectorAll("details[open] > summary")].map((node) => node.textContent)];
  await draw();
  for (const node of main.querySelectorAll("details > summary")) {
    if (open.includes(node.textContent)) node.parentNode.open = true;
  }
  scrollTo(0, top);
}

async function start() {
  // Asked for first: what comes while the page is drawn is new to it.
  const stamp = told ? null : JSON.stringify(await ask("stamp", {}));
  await refresh();
  await show(VIEWS.includes(place().view) ? place().view : "overview");
  if (!told) follow(stamp);
  else tell("A report: curves are whole, rollouts are those of some steps.");
}

addEventListener("hashchange", () => show(VIEWS.includes(place().view) ? place().view : "overview"));
start().catch((error) => tell(error.message));
