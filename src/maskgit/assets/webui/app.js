// The page: its two views, the runs of pictures, and what is remembered of them.
import { Problem, get, post, stream } from "./api.js";
import { Edit } from "./edit.js";
import { compare, inside } from "./dialogs.js";
import { Sampler } from "./sampler.js";
import { $, Classes, bytes, choice, enlarged, h, randomSeed, reduced, save, slug, source } from "./ui.js";

const KEPT = 40, LIKENESS = 0.6;

const world = {};
let classes, sampler, counts, edit, chosen = null, running = null, shown = [];

// ---- What is asked for: a recipe makes the same pictures again.
// { kind: "generate", label, seed, first, count, settings } or { kind: "vary", of: recipe, … }.

async function call(recipe, extra = {}) {
  const fields = { class: recipe.label, seed: recipe.seed, first_index: recipe.first, num_images: recipe.count, ...recipe.settings, ...extra };
  if (recipe.kind === "generate") return { path: "v1/generate", fields };
  const image = recipe.image ?? new Blob([bytes(await picture(recipe.of))], { type: "image/png" });
  return { path: "v1/vary", fields: { ...fields, strength: recipe.strength }, files: { image } };
}

// The file of a recipe of one picture, base64.
async function picture(recipe, signal) {
  return (await post(await call(recipe), signal)).images[0].image;
}

const titled = recipe => `${classes.name(recipe.label)}${recipe.kind === "vary" ? ", varied" : ""}`;
const filename = (recipe, times) => `${slug(titled(recipe))}-seed${recipe.seed}${recipe.first ? `-${recipe.first}` : ""}${times > 1 ? `-${times}x` : ""}.png`;
const without = recipe => JSON.parse(JSON.stringify(recipe, (key, value) => key === "image" ? undefined : value));

// ---- Pictures.

class Tile {
  constructor(recipe, face) {
    this.recipe = recipe;
    this.data = null;
    this.image = face ?? h("img", { alt: "", draggable: false });
    this.bar = h("i");
    this.frame = h("button", { type: "button", className: "face", ariaLabel: `${titled(recipe)}: show the actions`, onclick: () => this.toggle() }, this.image);
    const act = (label, run) => h("button", { type: "button", onclick: () => attempt(() => run(this)) }, label);
    this.actions = h("div", { className: "actions", role: "group", ariaLabel: `Actions for ${titled(recipe)}` },
      act("Edit", tile => openInEdit(tile)), act("More like this", tile => moreLike(tile)),
      act("How it formed", tile => openInside(tile)), act("Compare", tile => openCompare(tile)),
      act("Save 1×", tile => saveTile(tile, 1)), act("Save 4×", tile => saveTile(tile, 4)));
    this.element = h("figure", { className: "tile" }, this.frame, h("div", { className: "progress", ariaHidden: true }, this.bar), this.actions);
  }
  toggle() {
    const open = !this.element.classList.contains("open");
    for (const other of document.querySelectorAll(".tile.open")) other.classList.remove("open");
    this.element.classList.toggle("open", open);
  }
  progress(share) { this.bar.style.width = `${100 * share}%`; this.element.classList.add("working"); }
  show(data) { this.image.src = source(data); }
  finish(data) {
    this.data = data;
    this.show(data);
    this.image.alt = titled(this.recipe);
    this.element.classList.remove("working");
    this.element.classList.add("done");
  }
  async file() { return this.data ??= await picture(this.recipe); }
}

const openInEdit = async tile => { const data = await tile.file(); location.hash = "edit"; await edit.open(new Blob([bytes(data)], { type: "image/png" }), filename(tile.recipe, 1)); };
const openInside = async tile => inside(await call(tile.recipe, { return_trace: true }), titled(tile.recipe), filename(tile.recipe, 1));
const openCompare = async tile => compare(world, async settings => call({ ...tile.recipe, settings }), tile.recipe.settings, titled(tile.recipe));
async function saveTile(tile, times) {
  const data = bytes(await tile.file());
  save(times > 1 ? await enlarged(data, times) : new Blob([data], { type: "image/png" }), filename(tile.recipe, times));
}
async function moreLike(tile) {
  const image = new Blob([bytes(await tile.file())], { type: "image/png" });
  await run({ ...without(tile.recipe), kind: "vary", of: without(tile.recipe), strength: LIKENESS, image, seed: randomSeed(), first: 0, count: 9 });
}

function lay(tiles) {
  const gallery = $("#gallery");
  gallery.dataset.count = tiles.length === 1 ? 1 : tiles.length <= 4 ? 4 : 9;
  gallery.replaceChildren(...tiles.map(tile => tile.element));
  shown = tiles;
}

// ---- Running.

function say(text, { near = [] } = {}) {
  const status = $("#status");
  status.classList.remove("wrong");
  status.replaceChildren(text, ...near.flatMap(one => [" ", h("button", { type: "button", className: "near", onclick: () => start(one.number) }, one.name)]));
}

function complain(error) {
  const status = $("#status");
  if (error.name === "AbortError") return;
  if (!(error instanceof Problem)) console.error(error);
  status.classList.add("wrong");
  status.textContent = error instanceof Problem ? error.message : `Something on this page failed: ${error.message}`;
}

async function attempt(work) {
  try { await work(); } catch (error) { complain(error); }
}

const place = number => `${number}${{ 1: "st", 2: "nd", 3: "rd" }[number % 100 > 10 && number % 100 < 14 ? 0 : number % 10] ?? "th"} in line`;

function busy(stop) {
  running = stop;
  const go = $("#go");
  go.textContent = stop ? "Stop" : "Generate";
  go.classList.toggle("stop", !!stop);
}

async function run(recipe, { remember = true } = {}) {
  running?.abort();
  const control = new AbortController(), begun = performance.now();
  busy(control);
  const tiles = [...Array(recipe.count).keys()].map(number => new Tile({ ...recipe, first: recipe.first + number, count: 1 }));
  lay(tiles);
  say("Starting…");
  const steps = recipe.settings.steps ?? sampler.base(recipe.settings.policy ?? world.card.sampler.policy).steps;
  const of = index => tiles[index - recipe.first];
  try {
    const answer = await stream(await call(recipe), {
      queued: ({ place: number }) => say(number > 1 ? place(number) : "Starting…"),
      progress: ({ step, index }) => {
        of(index)?.progress((step + 1) / steps);
        say(`${titled(recipe)}: step ${step + 1} of ${steps}`);
      },
      preview: ({ index, image }) => of(index)?.show(image),
    }, control.signal);
    answer.images.forEach(({ image }, number) => tiles[number].finish(image));
    const count = recipe.count === 1 ? "1 picture" : `${recipe.count} pictures`;
    say(`${titled(recipe)}: ${count} in ${((performance.now() - begun) / 1000).toFixed(1)} s`);
    if (remember) await keep(recipe, tiles[0].image);
    address(recipe);
  } catch (error) {
    if (running !== control) return;
    if (error.name === "AbortError") say("Stopped.");
    else complain(error);
    for (const tile of tiles) tile.element.classList.remove("working");
  } finally {
    if (running === control) busy(null);
  }
}

// ---- The form.

function choose(number) {
  chosen = number;
  $("#search").value = number == null ? "" : classes.name(number);
  $("#picked").textContent = number == null ? "Anything" : classes.name(number);
  for (const button of $("#classes").children) button.ariaPressed = String(button.dataset.number === String(number));
}

function start(number) {
  choose(number);
  filter("");
  return run({ kind: "generate", label: number, seed: sampler.takeSeed(), first: 0, count: +counts.value, settings: sampler.value });
}

function submit() {
  if (running) { running.abort(); return; }
  const text = $("#search").value.trim();
  if (!text && chosen == null && !world.card.without_class) { say("Pick a class first, or let it be a surprise."); return; }
  if (!text) { start(null); return; }
  const found = chosen != null && text === classes.name(chosen) ? classes.listed[chosen] : classes.find(text);
  if (found.near) say(`There is no class “${text}”.${found.near.length ? " Did you mean" : ""}`, { near: found.near });
  else start(found.number);
}

function filter(text) {
  const found = new Set(classes.matching(text).map(one => one.number));
  for (const button of $("#classes").children) button.hidden = !found.has(+button.dataset.number);
}

function thumbnail(number, { columns }) {
  if (!columns) return null;
  const face = h("span", { className: "thumb" });
  const rows = Math.ceil(classes.listed.length / columns);
  face.style.backgroundImage = "url(v1/samples/classes.webp)";
  face.style.backgroundSize = `${100 * columns}% ${100 * rows}%`;
  face.style.backgroundPosition = `${columns > 1 ? 100 * (number % columns) / (columns - 1) : 0}% ${rows > 1 ? 100 * Math.floor(number / columns) / (rows - 1) : 0}%`;
  return face;
}

function build(samples) {
  $("#classes").classList.toggle("plain", !samples.columns);
  $("#classes").append(...classes.listed.map(({ number, name }) => {
    const button = h("button", { type: "button", ariaPressed: "false", onclick: () => start(number) }, thumbnail(number, samples), h("span", {}, name));
    button.dataset.number = number;
    return button;
  }));
  counts = choice($("#count"), [[1, "1"], [4, "4"], [9, "9"]], 9);
  sampler = new Sampler(world);
  $("#advanced").append(sampler.element);
  const search = $("#search");
  search.addEventListener("input", () => filter(search.value));
  search.addEventListener("focus", () => search.select());
  $("#create form").addEventListener("submit", event => { event.preventDefault(); submit(); });
  for (const button of document.querySelectorAll(".surprise"))
    button.addEventListener("click", () => start(Math.floor(Math.random() * classes.listed.length)));
  $("#more").addEventListener("click", event => {
    const open = $("#sheet").classList.toggle("open");
    event.target.ariaExpanded = String(open);
  });
  $("#load").addEventListener("change", event => { const [file] = event.target.files; event.target.value = ""; if (file) attempt(() => load(file)); });
}

// ---- Pictures that come with the model form once.

async function welcome(samples) {
  say("Pick something to draw, or start with one of these.");
  if (!samples.columns) {
    say("Pick something to draw.");
    lay([]);
    return;
  }
  const sheet = new Image();
  sheet.src = "v1/samples/forming.webp";
  await sheet.decode();
  if (running || shown.length) return;
  const side = sheet.width / samples.frames;
  const tiles = samples.forming.map(({ number, seed, index }) => {
    const canvas = h("canvas", { width: side, height: side, role: "img", ariaLabel: classes.name(number) });
    const tile = new Tile({ kind: "generate", label: number, seed, first: index, count: 1, settings: {} }, canvas);
    tile.draw = frame => canvas.getContext("2d").drawImage(sheet, frame * side, tiles.indexOf(tile) * side, side, side, 0, 0, side, side);
    tile.show = () => {};
    tile.element.classList.add("done");
    return tile;
  });
  lay(tiles);
  const last = samples.frames - 1;
  if (reduced()) { for (const tile of tiles) tile.draw(last); return; }
  const begun = performance.now();
  const step = now => {
    if (shown !== tiles) return;
    tiles.forEach((tile, number) => tile.draw(Math.max(0, Math.min(last, Math.floor((now - begun - 90 * number) / 150)))));
    if (now - begun < 90 * tiles.length + 150 * samples.frames) requestAnimationFrame(step);
  };
  step(begun);
}

// ---- What is remembered.

const storage = {
  read() { try { return JSON.parse(localStorage.getItem("maskgit.runs") ?? "[]").filter(one => one.model === world.card.name); } catch { return []; } },
  write(runs) { try { localStorage.setItem("maskgit.runs", JSON.stringify(runs)); } catch { /* It is full or forbidden. */ } },
};

async function keep(recipe, image) {
  await image.decode?.();
  const canvas = h("canvas", { width: 64, height: 64 });
  canvas.getContext("2d").drawImage(image, 0, 0, 64, 64);
  const kept = without(recipe);
  const key = JSON.stringify(kept);
  const runs = [{ model: world.card.name, recipe: kept, thumb: canvas.toDataURL("image/jpeg", 0.8) },
    ...storage.read().filter(one => JSON.stringify(one.recipe) !== key)].slice(0, KEPT);
  storage.write(runs);
  list(runs);
}

function list(runs) {
  $("#earlier").hidden = !runs.length;
  $("#runs").replaceChildren(...runs.map(({ recipe, thumb }) => h("button", {
    type: "button", ariaLabel: `${titled(recipe)}, ${recipe.count} with seed ${recipe.seed}: make again`, onclick: () => { restore(recipe); run(recipe); },
  }, h("img", { src: thumb, alt: "" }), h("span", {}, titled(recipe)))));
}

function restore(recipe) {
  choose(recipe.label);
  sampler.fill(recipe.settings);
  sampler.holdSeed(recipe.seed, sampler.locked.checked);
  if (["1", "4", "9"].includes(String(recipe.count))) counts.value = recipe.count;
}

function address(recipe) {
  if (recipe.kind !== "generate") return;
  const query = new URLSearchParams({ class: recipe.label == null ? "none" : classes.listed[recipe.label].name, seed: recipe.seed, count: recipe.count });
  if (recipe.first) query.set("first", recipe.first);
  for (const [name, value] of Object.entries(recipe.settings)) query.set(name, typeof value === "string" ? value : JSON.stringify(value));
  history.replaceState(null, "", `${location.pathname}?${query}${location.hash}`);
}

function linked() {
  const query = new URLSearchParams(location.search), text = query.get("class");
  if (text === null) return null;
  const found = text === "none" ? { number: null } : classes.find(text);
  if (found.near) throw new Problem(`The link names the class “${text}”, which this model does not have.`);
  const settings = {};
  for (const name of Object.keys(world.card.sampler)) {
    if (!query.has(name)) continue;
    const value = query.get(name);
    try { settings[name] = JSON.parse(value); } catch { settings[name] = value; }
  }
  const whole = (name, fallback, high) => { const value = query.get(name) ?? fallback; return /^\d{1,20}$/.test(value) && BigInt(value) <= high ? value : fallback; };
  return { kind: "generate", label: found.number, seed: whole("seed", randomSeed(), 2n ** 64n - 1n), first: +whole("first", "0", 2n ** 53n),
    count: Math.max(1, Math.min(16, +whole("count", "1", 16n))), settings };
}

// ---- Settings in files.

async function load(file) {
  const { settings } = await post({ path: "v1/inspect", fields: {}, files: { image: file } });
  if (!settings) throw new Problem(`${file.name} holds no settings; only PNG files written by maskgit do.`);
  if (settings.model !== world.card.name)
    throw new Problem(`${file.name} was made by the model “${settings.model}”, but this page runs “${world.card.name}”.`);
  const own = Object.fromEntries(Object.keys(world.card.sampler).filter(name => name in settings).map(name => [name, settings[name]]));
  const changed = sampler.changed(own);
  const text = settings.class == null ? "none" : String(settings.class);
  const found = text === "none" ? { number: null } : classes.find(text);
  if (found.near) throw new Problem(`${file.name} names the class “${text}”, which this model does not have.`);
  if (settings.command === "generate" || settings.command === "serve") {
    location.hash = "create";
    const recipe = { kind: "generate", label: found.number, seed: String(settings.seed), first: settings.index ?? 0, count: 1, settings: changed };
    restore(recipe);
    sampler.holdSeed(recipe.seed, true);
    await run(recipe);
    return;
  }
  if (!edit.takes(settings.command)) throw new Problem(`${file.name} was made by “maskgit ${settings.command}”, for which this page has no form.`);
  location.hash = "edit";
  await edit.restore(settings, found.number, changed, file.name);
}

// ---- The beginning.

function route() {
  const editing = location.hash === "#edit";
  $("#create").hidden = editing;
  $("#edit").hidden = !editing;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === (editing ? "#edit" : "#create")) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
}

async function begin() {
  const [models, listed, policies, samples] = await Promise.all(["v1/models", "v1/classes", "v1/policies", "v1/samples"].map(get));
  [world.card] = models.models;
  Object.assign(world, { policies: policies.policies, settings: policies.settings, schedules: policies.mask_schedules });
  classes = world.classes = new Classes(listed.classes);
  const size = world.card.image_size;
  $("#model").textContent = `${world.card.name} · ${size} × ${size} pixels · ${classes.listed.length} classes`;
  build(samples);
  edit = new Edit($("#edit"), world, { inside, load });
  list(storage.read());
  addEventListener("hashchange", route);
  // Links in the page are relative to its base, which has no query.
  for (const link of document.querySelectorAll("nav a")) link.addEventListener("click", event => { event.preventDefault(); location.hash = link.hash; });
  route();
  document.body.classList.add("ready");
  const recipe = linked();
  if (recipe) { restore(recipe); await run(recipe, { remember: false }); }
  else await welcome(samples);
}

attempt(begin);
