"use strict";
// All texts come from files that others may have written: they are set as textContent, and escaped
// where Plotly would take them for HTML.

const FIRST = ["loss/mean", "ntk/trace", "loss/accuracy", "ntk/entropy", "ntk/spectrum", "ntk/gram"];
const MOST = 48; // figures at a time
const PATIENCE = 20000; // milliseconds to wait for an answer
const $ = (id) => document.getElementById(id);
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 760px)");
const coarse = matchMedia("(pointer: coarse)");

const chosen = { runs: [], of: "", group: "", layers: [], figures: null, from: null, to: null, pairs: {}, stages: [], theme: "" };
let server = { runs: [] };
let known = []; // the figures that the chosen runs have
let choices = { groups: [], layers: [] };
let digests = { state: "", figures: "", asked: "" };
const cards = new Map();
let current = "";
let revision = 0;
// It is large: the page asks for runs and figures while it loads.
const drawing = new Promise((done) => (window.Plotly ? done() : $("plotly").addEventListener("load", done)));

// ---- the address -------------------------------------------------------------------------------

const whole = (text) => {
  const digits = String(text).trim().replaceAll(",", "");
  return /^-?\d{1,16}$/.test(digits) && Number.isSafeInteger(Number(digits)) ? Number(digits) : null;
};

function readAddress() {
  const said = new URLSearchParams(location.hash.slice(1));
  chosen.runs = said.getAll("run");
  chosen.of = said.get("of") || "";
  chosen.group = said.get("group") || "";
  chosen.layers = said.getAll("layer");
  chosen.figures = said.has("figure") || said.has("none") ? [...new Set(said.getAll("figure"))].slice(0, MOST) : null;
  chosen.from = whole(said.get("from") ?? "");
  chosen.to = whole(said.get("to") ?? "");
  chosen.theme = ["light", "dark"].includes(said.get("theme")) ? said.get("theme") : "";
  chosen.pairs = {};
  for (const text of said.getAll("compare")) {
    const [, a, b, name] = text.match(/^(-?\d{1,15}),(-?\d{1,15}),(.*)$/s) || [];
    if (name) chosen.pairs[name] = [Number(a), Number(b)];
  }
  chosen.stages = [];
  for (const text of said.getAll("stage").slice(0, 40)) {
    const [, step, name] = text.match(/^(-?\d{1,15})(?::(.*))?$/s) || [];
    if (step) chosen.stages.push({ step: Number(step), name: (name || "").slice(0, 40) });
  }
}

function writeAddress() {
  const said = new URLSearchParams();
  chosen.runs.forEach((run) => said.append("run", run));
  if (chosen.of) said.set("of", chosen.of);
  if (chosen.group) said.set("group", chosen.group);
  chosen.layers.forEach((name) => said.append("layer", name));
  if (chosen.figures) chosen.figures.forEach((name) => said.append("figure", name));
  if (chosen.figures && !chosen.figures.length) said.set("none", "");
  if (chosen.from !== null) said.set("from", chosen.from);
  if (chosen.to !== null) said.set("to", chosen.to);
  for (const [name, [a, b]] of Object.entries(chosen.pairs)) said.append("compare", `${a},${b},${name}`);
  chosen.stages.forEach((one) => said.append("stage", `${one.step}:${one.name}`));
  if (chosen.theme) said.set("theme", chosen.theme);
  const text = String(said);
  history.replaceState(null, "", location.pathname + (text ? "#" + text : "")); // without the token
}

// ---- what the server says ----------------------------------------------------------------------

async function ask(path, parameters) {
  const signal = AbortSignal.timeout(PATIENCE);
  const answer = await fetch(path + "?" + parameters, { credentials: "same-origin", cache: "no-store", signal });
  if (answer.status === 204) return null;
  if (!answer.ok) return { problem: (await answer.text()).trim(), digest: "" };
  return answer.json();
}

async function poll() {
  let pause = 400;
  if (!document.hidden) {
    try {
      const found = await ask("/state", new URLSearchParams({ have: digests.state }));
      if (found && found.runs) {
        server = found;
        digests.state = found.digest;
        showRuns();
        await update();
      } else if (found) {
        say(found.problem, true);
      }
      if (!found && $("status").classList.contains("ended")) showStatus();
    } catch (error) {
      say("no answer: the server has ended, or cannot be reached", true);
      pause = 3000;
    }
  }
  setTimeout(poll, pause);
}

const readable = () => server.runs.filter((run) => run.readable);
const isChosen = (run) => run.readable && (!picked().length || picked().includes(run.label));
// Those that are gone are left out; if none is left, all are shown.
const picked = () => chosen.runs.filter((label) => readable().some((run) => run.label === label));

function asked() {
  const said = new URLSearchParams();
  picked().forEach((label) => said.append("run", label));
  const there = readable().filter(isChosen);
  const of = there.find((run) => run.label === chosen.of) || there[0];
  if (of && there.length > 1) said.set("of", of.label);
  return said;
}

async function update() {
  const parameters = asked();
  if (digests.asked !== String(parameters)) digests.figures = "";
  digests.asked = String(parameters);
  if (digests.figures) parameters.set("have", digests.figures);
  if (readable().length) {
    const found = await ask("/figures", parameters);
    if (found && found.figures) {
      known = found.figures;
      choices = { groups: found.groups, layers: found.layers };
      digests.figures = found.digest;
      showMeasures();
      showChoices();
    } else if (found) {
      say(found.problem, true);
    }
  } else {
    known = [];
    choices = { groups: [], layers: [] };
    showMeasures();
    showChoices();
  }
  showCards();
}

// ---- runs and measures -------------------------------------------------------------------------

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function say(text, ended = false) {
  $("status").textContent = text;
  $("status").title = text;
  $("status").classList.toggle("ended", ended);
}

function showStatus() {
  const there = readable().filter(isChosen);
  const last = Math.max(...there.map((run) => run.last));
  const runs = there.length === 1 ? there[0].label : `${there.length} runs`;
  say(there.length ? `${runs}, to step ${last.toLocaleString("en")}` : "no run can be read yet");
}

function showRuns() {
  const focused = document.activeElement?.closest("#runs li")?.dataset.label;
  $("runs").replaceChildren(
    ...[...server.runs].sort((a, b) => a.label.localeCompare(b.label, "en", { numeric: true })).map((run) => {
      const box = make("input", { type: "checkbox", checked: isChosen(run), disabled: !run.readable });
      box.addEventListener("change", () => pickRun(run.label, box.checked));
      const row = make("li", { title: run.folder }, make("label", {}, box, make("span", { textContent: run.label })));
      row.dataset.label = run.label;
      if (run.readable) {
        row.append(make("small", { textContent: `${run.records.toLocaleString("en")} records, to step ${run.last.toLocaleString("en")}` }));
      }
      if (run.problem) row.append(make("small", { className: "bad", textContent: run.problem }));
      return row;
    }),
  );
  if (focused !== undefined) [...$("runs").children].find((row) => row.dataset.label === focused)?.querySelector("input").focus();
  const there = readable().filter(isChosen);
  const labels = JSON.stringify([chosen.of, ...there.map((run) => run.label)]);
  if ($("of").dataset.labels !== labels) { // or else an open list would close
    $("of").dataset.labels = labels;
    $("of").replaceChildren(...there.map((run) => make("option", { value: run.label, textContent: run.label, selected: run.label === chosen.of })));
  }
  $("of-label").hidden = there.length < 2;
  showStatus();
}

function showChoices() {
  const { groups, layers } = choices;
  const named = (value, textContent) => make("option", { value, textContent, selected: value === chosen.group });
  $("group").replaceChildren(named("", "nothing"), ...groups.map((key) => named(key, key)));
  $("group-label").hidden = !groups.length;
  $("layers").replaceChildren(
    ...layers.map((name) => {
      const box = make("input", { type: "checkbox", checked: chosen.layers.includes(name) });
      box.dataset.layer = name;
      box.addEventListener("change", () => pickLayers(box.checked ? [...chosen.layers, name] : chosen.layers.filter((one) => one !== name)));
      return make("label", {}, box, make("span", { textContent: name }));
    }),
  );
  $("layers-section").hidden = !layers.length;
}

function pickLayers(names) {
  chosen.layers = names.slice(0, 40);
  writeAddress();
  showChoices();
  cards.forEach(refresh);
}

function pickRun(label, on) {
  const now = readable().filter(isChosen).map((run) => run.label);
  const next = on ? [...now, label] : now.filter((one) => one !== label);
  if (!next.length) {
    showRuns();
    say("one run at least is shown", true);
    return;
  }
  chosen.runs = next.length === readable().length ? [] : next;
  again();
}

function again() {
  writeAddress();
  showRuns();
  update().catch(() => say("no answer from the server", true));
}

function showMeasures() {
  if (!chosen.figures && known.length) {
    const names = known.map((one) => one.name);
    const tracks = known.filter((one) => one.kind === "track").map((one) => one.name);
    chosen.figures = [...new Set([...FIRST.filter((name) => names.includes(name)), ...tracks, ...names])].slice(0, 6);
  }
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const groups = new Map();
  for (const one of known) {
    if (!words.every((word) => one.name.toLowerCase().includes(word))) continue;
    const group = one.kind === "pair" ? "pairs" : one.name.split("/")[0];
    groups.set(group, [...(groups.get(group) || []), one]);
  }
  const open = new Set([...document.querySelectorAll("#measures details[open]")].map((one) => one.dataset.group));
  const fresh = !$("measures").children.length;
  $("measures").replaceChildren(
    ...[...groups].map(([group, its]) => {
      const shown = its.filter((one) => chosen.figures?.includes(one.name)).length;
      const summary = make("summary", { textContent: group + " " }, make("small", { textContent: shown ? `${shown} of ${its.length}` : its.length }));
      const rows = its.map((one) => {
        const box = make("input", { type: "checkbox", checked: chosen.figures?.includes(one.name) });
        box.dataset.name = one.name;
        box.addEventListener("change", () => pickFigure(one.name, box.checked));
        const text = one.kind === "pair" ? one.name : one.name.slice(group.length + 1) || one.name;
        return make("label", {}, box, make("span", { textContent: text }));
      });
      const details = make("details", { open: words.length > 0 || open.has(group) || (fresh && shown > 0) }, summary, make("div", {}, ...rows));
      details.dataset.group = group;
      return details;
    }),
  );
  if (words.length && !groups.size) $("measures").append(make("p", { className: "problem", textContent: "nothing of that name" }));
}

function pickFigure(name, on) {
  const others = (chosen.figures || []).filter((one) => one !== name);
  if (on && others.length >= MOST) say(`at most ${MOST} figures at a time`, true);
  chosen.figures = on && others.length < MOST ? [...others, name] : others;
  if (!on) delete chosen.pairs[name];
  writeAddress();
  showMeasures();
  showCards();
  if (on) cards.get(name)?.element.scrollIntoView({ block: "nearest", behavior: "smooth" });
}

// ---- figures -----------------------------------------------------------------------------------

const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      const card = cards.get(entry.target.dataset.name);
      if (!card) continue;
      card.visible = entry.isIntersecting;
      refresh(card);
    }
  },
  { root: null, rootMargin: "120px" },
);

function showCards() {
  const wanted = readable().length ? chosen.figures || [] : [];
  for (const [name, card] of cards) {
    if (wanted.includes(name)) continue;
    seen.unobserve(card.element);
    if (card.plot.data) Plotly.purge(card.plot);
    card.element.remove();
    cards.delete(name);
  }
  for (const name of wanted) {
    if (!cards.has(name)) cards.set(name, newCard(name));
    if ([...$("figures").children].indexOf(cards.get(name).element) < 0) {
      $("figures").append(cards.get(name).element);
      seen.observe(cards.get(name).element);
    }
  }
  $("figures").querySelector(".none")?.remove();
  if (!wanted.length) {
    const why = server.runs.filter((run) => run.problem).map((run) => `${run.label}: ${run.problem}`);
    const text = readable().length ? "No figure is chosen: choose measures." : ["No run can be read yet; this page goes on looking.", ...why].join("\n");
    $("figures").append(make("p", { className: "none", textContent: text, style: "white-space: pre-line" }));
  }
  cards.forEach(refresh);
}

function newCard(name) {
  const button = (text, title, act) => {
    const made = make("button", { type: "button", textContent: text, title });
    made.addEventListener("click", act);
    return made;
  };
  const card = { name, visible: false, busy: false, key: "", url: "", digest: "", body: null };
  const inputs = [0, 1].map((number) => {
    const input = make("input", { inputMode: "numeric", ariaLabel: number ? "second step" : "first step" });
    input.addEventListener("change", () => {
      const step = whole(input.value);
      if (step !== null && chosen.pairs[name]) chosen.pairs[name][number] = step;
      input.blur(); // keys act again, and the field shows what is drawn
      writeAddress();
      refresh(card);
    });
    return input;
  });
  card.inputs = inputs;
  card.pair = make("span", { className: "pair", hidden: true }, "steps ", inputs[0], " and ", inputs[1]);
  card.compare = button("compare", "two steps beside each other", () => {
    if (chosen.pairs[name]) delete chosen.pairs[name];
    else chosen.pairs[name] = ends();
    writeAddress();
    refresh(card);
  });
  card.compare.className = "compare";
  card.table = make("a", { textContent: "CSV", title: "what is drawn, as a table", className: "csv" });
  card.table.setAttribute("download", "");
  const image = (format) => () => {
    if (!card.plot.data) return;
    const { width, height } = card.plot.getBoundingClientRect();
    Plotly.downloadImage(card.plot, { format, width, height, scale: 2, filename: name.replace(/[^A-Za-z0-9]+/g, "-") });
  };
  card.plot = make("div", { className: "plot" });
  card.problem = make("p", { className: "problem", hidden: true });
  card.element = make(
    "article",
    { className: "card", tabIndex: -1, ariaLabel: name },
    make("div", { className: "bar" }, card.pair, card.compare, card.table, button("PNG", "save the figure", image("png")), button("SVG", "save the figure", image("svg")), button("×", "hide", () => pickFigure(name, false))),
    card.problem,
    card.plot,
  );
  card.element.dataset.name = name;
  card.element.addEventListener("focusin", () => mark(name));
  return card;
}

function ends() {
  const there = readable().filter(isChosen);
  return [chosen.from ?? Math.min(...there.map((run) => run.first)), chosen.to ?? Math.max(...there.map((run) => run.last))];
}

function address(card) {
  const said = asked();
  said.set("name", card.name);
  said.set("theme", theme());
  const { kind } = known.find((one) => one.name === card.name) || {};
  if (kind === "track" && choices.groups.includes(chosen.group)) said.set("group", chosen.group);
  if (kind === "layers") chosen.layers.filter((name) => choices.layers.includes(name)).forEach((name) => said.append("layer", name));
  const pair = chosen.pairs[card.name];
  if (pair) {
    pair.forEach((step) => said.append("at", step));
    if ($("figures").clientWidth < 620) said.set("rows", 2); // one below the other
  } else {
    if (chosen.from !== null) said.set("from", chosen.from);
    if (chosen.to !== null) said.set("to", chosen.to);
  }
  return said;
}

async function refresh(card) {
  const pair = chosen.pairs[card.name];
  const { kind, compared } = known.find((one) => one.name === card.name) || {};
  card.compare.hidden = !compared;
  card.element.classList.toggle("wide", Boolean(pair) && kind === "matrix");
  card.compare.setAttribute("aria-pressed", Boolean(pair));
  card.pair.hidden = !pair;
  if (pair) card.inputs.forEach((input, number) => document.activeElement === input || (input.value = pair[number]));
  if (!card.visible || !readable().length) return;
  const parameters = address(card);
  const url = String(parameters);
  card.table.href = "/table?" + url;
  const key = url + server.runs.filter(isChosen).map((run) => run.version).join();
  if (key === card.key || card.busy) return;
  card.busy = true;
  try {
    if (card.url === url && card.digest) parameters.set("have", card.digest);
    const body = await ask("/figure", parameters);
    card.key = key;
    card.url = url;
    if (body) {
      card.digest = body.digest;
      card.body = body;
      await draw(card);
    }
  } catch (error) {
    say("no answer from the server", true);
  } finally {
    card.busy = false;
  }
  if (cards.get(card.name) === card && String(address(card)) !== url) refresh(card);
}

const escaped = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

async function draw(card) {
  const { figure, steps, problem } = card.body;
  card.problem.hidden = !problem;
  card.plot.hidden = Boolean(problem);
  if (problem) {
    card.problem.replaceChildren(make("b", { textContent: card.name }), problem);
    return;
  }
  await drawing;
  const layout = structuredClone(figure.layout);
  fitTitle(layout, card.plot.clientWidth || 400);
  const data = figure.data.map((one) => ({ ...one }));
  layout.uirevision = revision;
  layout.autosize = true;
  layout.dragmode = coarse.matches ? false : "zoom";
  if (steps) addSteps(layout, steps);
  keepSlider(card, layout, data);
  const config = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["toImage", "select2d", "lasso2d", "autoScale2d"] };
  card.plot.style.height = layout.height + "px";
  const isNew = !card.plot.data;
  await Plotly.react(card.plot, data, layout, config);
  if (isNew) {
    card.plot.on("plotly_relayout", (change) => zoomed(card, change));
    card.plot.on("plotly_click", (event) => {
      if (event.event?.shiftKey && card.body.steps) openStages(Math.round(fromPlace(card, event.points[0].x)));
    });
  }
}

const fromPlace = (card, place) => (card.body.steps === "log" ? place - 1 : place);

function addSteps(layout, steps) {
  const place = (step) => (steps === "log" ? step + 1 : step);
  const onAxis = (step) => (steps === "log" ? Math.log10(Math.max(step, -0.5) + 1) : step);
  const [first, last] = ends();
  if (chosen.from !== null || chosen.to !== null) {
    layout.xaxis = { ...layout.xaxis, range: [onAxis(first), onAxis(last)], autorange: false };
  }
  const ground = layout.template.layout.paper_bgcolor + "B0";
  const stages = chosen.stages.filter((one) => one.step >= first && one.step <= last);
  layout.shapes = [...(layout.shapes || []), ...stages.map((one) => ({ type: "line", x0: place(one.step), x1: place(one.step), yref: "paper", y0: 0, y1: 1, line: { dash: "dot", width: 1.5, color: "#808080" } }))];
  layout.annotations = [...(layout.annotations || []), ...stages.map((one) => ({ x: onAxis(one.step), yref: "paper", y: 1, yanchor: "top", xanchor: "left", showarrow: false, text: escaped(one.name || `step ${one.step}`), font: { size: 11 }, bgcolor: ground, borderpad: 1 }))];
}

// Titles begin at the left edge, and what is said below them is wrapped to the width.
function fitTitle(layout, width) {
  Object.assign(layout.title, { xref: "container", x: 0, pad: { l: 10 } });
  layout.title.font = { size: Math.max(9, Math.min(15, Math.floor((1.75 * width) / (layout.title.text || "").length))) };
  const subtitle = layout.title.subtitle;
  if (!subtitle?.text || width > 480) return;
  const lines = [""];
  for (const word of subtitle.text.replaceAll("<br>", " ").split(" ")) {
    if ((lines.at(-1) + word).length > width / 6.2) lines.push("");
    lines[lines.length - 1] += (lines.at(-1) ? " " : "") + word;
  }
  const more = lines.length - subtitle.text.split("<br>").length;
  subtitle.text = lines.join("<br>");
  layout.margin = { ...layout.margin, t: layout.margin.t + 15 * more };
  layout.height += 15 * more;
}

// A slider stays where it was; at its end it follows the run.
function keepSlider(card, layout, data) {
  const before = card.plot.layout?.sliders?.[0];
  const slider = layout.sliders?.[0];
  if (!before?.steps || !slider?.steps || before.active === before.steps.length - 1) return;
  const number = (one) => Number(one.label.replaceAll(",", ""));
  const wanted = number(before.steps[before.active]);
  const gaps = slider.steps.map((one) => Math.abs(number(one) - wanted));
  if (gaps.some(Number.isNaN)) return;
  slider.active = gaps.indexOf(Math.min(...gaps));
  slider.steps[slider.active].args[0].visible.forEach((on, place) => (data[place].visible = on));
}

function zoomed(card, change) {
  if (!card.body.steps) return;
  if (change["xaxis.autorange"]) setRange(null, null);
  if (change["xaxis.range[0]"] === undefined) return;
  const [a, b] = [change["xaxis.range[0]"], change["xaxis.range[1]"]].map((place) => fromPlace(card, card.body.steps === "log" ? 10 ** place : place));
  setRange(Math.round(a), Math.max(Math.round(b), Math.round(a) + 1));
}

function setRange(from, to) {
  if (from === chosen.from && to === chosen.to) return;
  [chosen.from, chosen.to] = [from, to];
  if (from === null && to === null) revision += 1;
  showRange();
  writeAddress();
  cards.forEach(refresh);
}

function showRange() {
  $("from").value = chosen.from ?? "";
  $("to").value = chosen.to ?? "";
  for (const id of ["from", "to"]) $(id).removeAttribute("aria-invalid");
}

// ---- stages, theme, keys -----------------------------------------------------------------------

function redraw() {
  for (const card of cards.values()) if (card.body && card.visible) draw(card);
    else card.key = card.digest = "";
}

function openStages(step) {
  $("stage-list").replaceChildren(
    ...chosen.stages.map((one) => {
      const gone = make("button", { type: "button", textContent: "×", title: "remove", className: "small" });
      gone.addEventListener("click", () => {
        chosen.stages = chosen.stages.filter((other) => other !== one);
        writeAddress();
        redraw();
        openStages();
      });
      return make("li", {}, gone, make("span", { textContent: `${one.step}: ${one.name}` }));
    }),
  );
  $("stage-step").value = step ?? "";
  $("stage-name").value = "";
  if (!$("stages").open) $("stages").showModal();
  $(step === undefined ? "stage-step" : "stage-name").focus();
}

const theme = () => chosen.theme || (dark.matches ? "dark" : "light");

function showTheme() {
  document.documentElement.dataset.theme = theme();
  cards.forEach(refresh);
}

function mark(name) {
  cards.get(current)?.element.classList.remove("current");
  current = name;
  cards.get(current)?.element.classList.add("current");
}

function go(by) {
  const names = chosen.figures || [];
  if (!names.length) return;
  const place = names.indexOf(current);
  const next = names[place < 0 ? 0 : Math.max(0, Math.min(names.length - 1, place + by))];
  mark(next);
  cards.get(next)?.element.scrollIntoView({ block: "start", behavior: "smooth" });
}

const toggleTheme = () => {
  chosen.theme = theme() === "dark" ? "light" : "dark";
  writeAddress();
  showTheme();
};

document.addEventListener("keydown", (event) => {
  const typing = event.target.closest("input, select, textarea, dialog");
  if (event.key === "Escape" && event.target === $("search")) $("search").blur();
  if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
  const act = {
    j: () => go(1),
    k: () => go(-1),
    t: toggleTheme,
    m: () => openStages(),
    "?": () => $("help").showModal(),
    "/": () => {
      document.body.classList.add("choosing");
      $("search").focus();
      $("search").select();
    },
  }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
});

$("search").addEventListener("input", showMeasures);
$("search").addEventListener("keydown", (event) => {
  const first = document.querySelector("#measures input");
  if (event.key === "Enter" && $("search").value && first) first.click();
});
$("of").addEventListener("change", () => {
  chosen.of = $("of").value;
  again();
});
$("group").addEventListener("change", () => {
  chosen.group = $("group").value;
  writeAddress();
  cards.forEach(refresh);
});
$("layers-all").addEventListener("click", () => pickLayers([]));
$("runs-all").addEventListener("click", () => {
  chosen.runs = [];
  again();
});
$("range").addEventListener("submit", (event) => event.preventDefault());
$("range").addEventListener("change", () => {
  const [from, to] = ["from", "to"].map((id) => whole($(id).value));
  const wrong = ["from", "to"].filter((id) => $(id).value.trim() && whole($(id).value) === null);
  if (from !== null && to !== null && from > to) wrong.push("from", "to"); // until both are typed
  for (const id of ["from", "to"]) $(id).toggleAttribute("aria-invalid", wrong.includes(id));
  if (!wrong.length) setRange(from, to);
});
$("whole").addEventListener("click", () => setRange(null, null));
$("theme").addEventListener("click", toggleTheme);
$("help-open").addEventListener("click", () => $("help").showModal());
$("stages-open").addEventListener("click", () => openStages());
$("stage-form").addEventListener("submit", (event) => {
  if (event.submitter?.value === "close") return;
  event.preventDefault();
  const step = whole($("stage-step").value);
  $("stage-step").toggleAttribute("aria-invalid", step === null);
  if (step === null || chosen.stages.length >= 40) return;
  chosen.stages.push({ step, name: $("stage-name").value.trim().slice(0, 40) });
  writeAddress();
  redraw();
  openStages();
});
$("menu").addEventListener("click", () => {
  const open = document.body.classList.toggle("choosing");
  $("menu").setAttribute("aria-expanded", open);
});
dark.addEventListener("change", showTheme);
narrow.addEventListener("change", () => cards.forEach(refresh));
addEventListener("hashchange", () => {
  readAddress();
  revision += 1;
  showRange();
  showTheme();
  again();
  redraw();
});

readAddress();
writeAddress();
showRange();
showTheme();
poll();
