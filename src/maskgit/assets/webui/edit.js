// The view that edits a photo: paint, box, extend or remix.
import { Problem, post, stream } from "./api.js";
import { Sampler } from "./sampler.js";
import { $, bytes, choice, h, icon, save, slider, slug, source } from "./ui.js";

const WAYS = {
  inpaint: { title: "Paint", icon: "paint", hint: "Paint over what should change." },
  edit: { title: "Box", icon: "box", hint: "Draw a box around what should change; drag it or its corners, or type numbers." },
  outpaint: { title: "Extend", icon: "extend", hint: "Choose the sides to extend. The photo is first scaled to the model's size, and the picture comes back at that scale." },
  vary: { title: "Remix", icon: "remix", hint: "The middle of the photo comes back as a new picture of the model's size." },
};
const DONE = { inpaint: "painted", edit: "box", outpaint: "extended", vary: "remixed" };
const SIDES = ["left", "top", "right", "bottom"], BOX = ["Left", "Top", "Width", "Height"];
const COLOUR = "#e0463f", UNDO = 30;
// What the command line can set and this view cannot.
const UNSET = { rule: "cover", invert: false, share: 0, feather: null, canvas: null, position: null };

const toBlob = canvas => new Promise(done => canvas.toBlob(done, "image/png"));
const toPicture = async data => createImageBitmap(new Blob([bytes(data)]));

export class Edit {
  constructor(section, world, { inside, load }) {
    Object.assign(this, { section, world, inside, load, photo: null, pending: null, running: null, box: null, exact: null, undo: [] });
    this.build();
    this.remembered();
  }

  takes(command) { return command in WAYS; }

  // ---- The form.

  build() {
    const { card } = this.world, patch = card.image_size / card.grid_size;
    this.status = h("p", { className: "status", role: "status" }, "Choose a photo to begin.");
    const ways = h("fieldset", { className: "choice ways" }, h("legend", {}, "What to do"));
    this.way = choice(ways, Object.entries(WAYS).map(([key, way]) => [key, [icon(way.icon), way.title]]), "inpaint", () => this.changed());
    this.hint = h("p", { className: "help" });
    this.size = slider("Brush size", { min: 2, max: 200, step: 1, value: 60 });
    this.grow = slider("Expand the painted area", { min: 0, max: 4, step: 1, value: 0 }, () => this.clean());
    this.erase = h("input", { type: "checkbox" });
    this.numbers = BOX.map(name => h("input", { type: "number", min: 0, step: 1, ariaLabel: name, onchange: () => this.typed() }));
    this.sides = SIDES.map(side => h("input", { type: "checkbox", name: side, checked: side === "left" || side === "right", onchange: () => this.clean() }));
    this.amount = slider("Pixels on each side", { min: patch, max: 4 * card.image_size, step: patch, value: card.image_size / 2 }, () => this.clean());
    this.strength = slider("How different", { min: 0, max: 1, step: 0.05, value: 0.5, help: "0 keeps the picture, 1 makes a new one." }, () => this.clean());
    this.groups = {
      inpaint: h("div", {}, this.size.element, h("div", { className: "line" },
        h("label", { className: "check" }, this.erase, "Erase"),
        h("button", { type: "button", onclick: () => this.takeBack() }, "Undo"),
        h("button", { type: "button", onclick: () => this.wipe() }, "Clear")), this.grow.element),
      edit: h("div", { className: "numbers" }, ...BOX.map((name, i) => h("label", {}, name, this.numbers[i]))),
      outpaint: h("div", {}, h("div", { className: "sides", role: "group", ariaLabel: "Sides" },
        ...SIDES.map((side, i) => h("label", { className: "check" }, this.sides[i], side))), this.amount.element),
      vary: h("div", {}, this.strength.element),
    };
    const names = h("datalist", { id: "names" }, ...this.world.classes.listed.map(({ name }) => h("option", { value: name })));
    this.label = h("input", { type: "text", ariaLabel: "What should appear", oninput: () => this.clean() });
    this.label.setAttribute("list", "names");
    const count = h("fieldset", { className: "choice" }, h("legend", {}, "How many"));
    this.count = choice(count, [[1, "1"], [4, "4"]], 1);
    this.sampler = new Sampler(this.world);
    this.apply = h("button", { type: "submit", className: "primary" }, "Apply");
    const file = (text, accept, use, type = "quiet") => h("label", { className: `${type} file` }, text, h("input", {
      type: "file", accept, onchange: event => { const [chosen] = event.target.files; event.target.value = ""; if (chosen) this.attempt(() => use(chosen)); },
    }));
    const form = h("form", { className: "panel", autocomplete: "off", onsubmit: event => { event.preventDefault(); this.attempt(() => this.run()); } },
      h("div", { className: "pick" }, file("Choose a photo", "image/*", chosen => this.open(chosen, chosen.name), "button"), ways, this.hint,
        ...Object.values(this.groups), h("div", { className: "field" }, h("div", { className: "line" }, h("span", {}, "What should appear")), this.label, names), count,
        h("details", { className: "advanced" }, h("summary", {}, "Advanced"), this.sampler.element),
        file("Load settings from a saved PNG", "image/png", this.load)),
      h("div", { className: "bar" }, this.apply));
    this.view = h("img", { alt: "The photo to edit", draggable: false });
    this.canvas = h("canvas", { className: "mask" });
    this.frame = h("div", { className: "box", hidden: true }, ...["nw", "n", "ne", "e", "se", "s", "sw", "w"].map(name => h("i", { className: name })));
    this.board = h("div", { className: "board", hidden: true }, this.view, this.canvas, this.frame);
    this.drop = h("label", { className: "drop" }, h("span", {}, "Drop a photo here, or choose one"), h("input", {
      type: "file", accept: "image/*", onchange: event => { const [chosen] = event.target.files; event.target.value = ""; if (chosen) this.attempt(() => this.open(chosen, chosen.name)); } }));
    this.outcome = h("div", { className: "outcome", hidden: true });
    const stage = h("div", { className: "stage" }, this.status, this.drop, this.board, this.outcome);
    stage.addEventListener("dragover", event => event.preventDefault());
    stage.addEventListener("drop", event => { event.preventDefault(); const [chosen] = event.dataTransfer.files; if (chosen) this.attempt(() => this.open(chosen, chosen.name)); });
    this.section.append(form, stage);
    this.pointers();
    this.changed();
  }

  say(text) { this.status.classList.remove("wrong"); this.status.textContent = text; }

  async attempt(work) {
    try { await work(); } catch (error) {
      if (error.name === "AbortError") return;
      if (!(error instanceof Problem)) console.error(error);
      this.status.classList.add("wrong");
      this.status.textContent = error instanceof Problem ? error.message : `Something on this page failed: ${error.message}`;
    }
  }

  get guesses() { return this.way.value !== "outpaint"; }

  changed() {
    const way = this.way.value;
    for (const [name, group] of Object.entries(this.groups)) group.hidden = name !== way;
    this.hint.textContent = WAYS[way].hint;
    this.label.placeholder = this.guesses ? "Guess from the picture" : this.world.card.without_class ? "Anything" : "Name a class";
    this.canvas.hidden = way !== "inpaint";
    this.drawBox();
    this.clean();
  }

  // A result or a complaint belongs to what was there before.
  clean() {
    this.outcome.hidden = true;
    this.drop.hidden = !!this.photo;
    this.board.hidden = !this.photo;
    if (this.photo) this.say(`${this.photo.name}, ${this.photo.width} × ${this.photo.height} pixels`);
    this.remember();
  }

  // ---- The photo.

  async open(file, name) {
    this.running?.abort();
    this.say("Reading the photo…");
    let found;
    try {
      found = await post({ path: "v1/inspect", fields: {}, files: { image: file } });
    } catch (error) {
      throw error instanceof Problem ? new Problem(error.message.replace(/^The photo/, name)) : error;
    }
    const { width, height, sha256, preview } = found;
    this.photo = { file, name, width, height, sha256 };
    this.view.src = `data:image/webp;base64,${preview}`;
    await this.view.decode();
    Object.assign(this.canvas, { width: this.view.naturalWidth, height: this.view.naturalHeight });
    this.board.style.setProperty("--ratio", width / height);
    this.board.style.aspectRatio = `${width} / ${height}`;
    this.size.value = Math.round(Math.max(this.canvas.width, this.canvas.height) / 10);
    Object.assign(this, { exact: null, undo: [], box: null });
    this.drawBox();
    this.clean();
    const pending = this.pending;
    if (pending && pending.settings.photo_sha256 === sha256) {
      this.pending = null;
      await this.restore(pending.settings, pending.label, pending.changed, pending.name);
    }
  }

  at(event) {
    const seen = this.board.getBoundingClientRect();
    return [(event.clientX - seen.left) / seen.width, (event.clientY - seen.top) / seen.height];
  }

  pointers() {
    let last = null, grip = null, from = null, kept = null;
    const clamp = (value, high) => Math.max(0, Math.min(high, value));
    this.board.addEventListener("pointerdown", event => {
      if (!this.photo || event.button) return;
      event.preventDefault();
      this.board.setPointerCapture(event.pointerId);
      if (this.way.value === "inpaint") {
        const context = this.canvas.getContext("2d");
        this.undo.push(context.getImageData(0, 0, this.canvas.width, this.canvas.height));
        if (this.undo.length > UNDO) this.undo.shift();
        last = this.at(event);
        this.stroke(last, last);
      } else if (this.way.value === "edit") {
        const on = event.target.closest(".box i")?.className ?? (event.target === this.frame ? "move" : "new");
        grip = on;
        from = this.at(event);
        kept = this.box && [...this.box];
      }
    });
    this.board.addEventListener("pointermove", event => {
      if (last) {
        const now = this.at(event);
        this.stroke(last, now);
        last = now;
      } else if (grip) {
        const { width, height } = this.photo, [x, y] = this.at(event);
        const dx = Math.round((x - from[0]) * width), dy = Math.round((y - from[1]) * height);
        if (grip === "move") {
          this.box = [clamp(kept[0] + dx, width - kept[2]), clamp(kept[1] + dy, height - kept[3]), kept[2], kept[3]];
        } else {
          let [left, top, right, bottom] = grip === "new"
            ? [from[0] * width, from[1] * height, x * width, y * height]
            : [kept[0] + (grip.includes("w") ? dx : 0), kept[1] + (grip.includes("n") ? dy : 0),
              kept[0] + kept[2] + (grip.includes("e") ? dx : 0), kept[1] + kept[3] + (grip.includes("s") ? dy : 0)];
          [left, right] = [left, right].map(value => Math.round(clamp(value, width))).sort((a, b) => a - b);
          [top, bottom] = [top, bottom].map(value => Math.round(clamp(value, height))).sort((a, b) => a - b);
          this.box = right - left > 1 && bottom - top > 1 ? [left, top, right - left, bottom - top] : kept;
        }
        this.drawBox();
      }
    });
    const up = () => { if (last || grip) this.clean(); last = grip = null; };
    this.board.addEventListener("pointerup", up);
    this.board.addEventListener("pointercancel", up);
  }

  stroke(from, to) {
    const context = this.canvas.getContext("2d"), { width, height } = this.canvas;
    context.globalCompositeOperation = this.erase.checked ? "destination-out" : "source-over";
    Object.assign(context, { lineCap: "round", lineJoin: "round", lineWidth: this.size.value, strokeStyle: COLOUR });
    context.beginPath();
    context.moveTo(from[0] * width, from[1] * height);
    context.lineTo(to[0] * width + 0.01, to[1] * height);
    context.stroke();
    this.exact = null;
  }

  takeBack() {
    const before = this.undo.pop();
    if (before) this.canvas.getContext("2d").putImageData(before, 0, 0);
    this.exact = null;
    this.clean();
  }

  wipe() {
    this.canvas.getContext("2d").clearRect(0, 0, this.canvas.width, this.canvas.height);
    this.exact = null;
    this.clean();
  }

  typed() {
    if (!this.photo) return;
    const { width, height } = this.photo;
    const [left, top, wide, high] = this.numbers.map(input => Math.max(0, Math.round(+input.value)));
    this.box = wide && high ? [Math.min(left, width - 1), Math.min(top, height - 1), Math.min(wide, width - Math.min(left, width - 1)), Math.min(high, height - Math.min(top, height - 1))]
      : null;
    if (this.box) this.drawBox(); else this.frame.hidden = true;
    this.clean();
  }

  drawBox() {
    this.frame.hidden = this.way.value !== "edit" || !this.box;
    this.numbers.forEach((input, i) => { input.value = this.box?.[i] ?? ""; });
    if (!this.box || !this.photo) return;
    const { width, height } = this.photo, share = [width, height, width, height];
    ["left", "top", "width", "height"].forEach((name, i) => { this.frame.style[name] = `${100 * this.box[i] / share[i]}%`; });
  }

  // White where painted, at the photo's size.
  async mask() {
    if (this.exact) return this.exact;
    const { width, height } = this.photo, made = h("canvas", { width, height }), context = made.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(this.canvas, 0, 0, width, height);
    const pixels = context.getImageData(0, 0, width, height), values = new Uint32Array(pixels.data.buffer);
    let painted = false;
    for (let i = 0; i < values.length; i++) {
      const on = values[i] >>> 24 > 127;
      painted ||= on;
      values[i] = on ? 0xffffffff : 0xff000000;
    }
    if (!painted) throw new Problem("Nothing is painted yet: paint over what should change.");
    context.putImageData(pixels, 0, 0);
    return toBlob(made);
  }

  // ---- Applying.

  async call() {
    if (!this.photo) throw new Problem("There is no photo yet; choose one first.");
    const way = this.way.value, text = this.label.value.trim(), files = { image: this.photo.file };
    const fields = { seed: this.sampler.takeSeed(), first_index: this.first ?? 0, num_images: +this.count.value, ...this.sampler.value };
    if (!text) {
      if (!this.guesses && !this.world.card.without_class) throw new Problem("This model needs a class: name what should appear.");
      fields.class = this.guesses ? "guess" : null;
    } else {
      const found = this.world.classes.find(text);
      if (found.near) throw new Problem(`There is no class “${text}”.${found.near.length ? ` Did you mean ${found.near.map(one => one.name).join(" or ")}?` : ""}`);
      fields.class = found.number;
    }
    if (way === "inpaint") { files.mask = await this.mask(); fields.dilate = this.grow.value; }
    if (way === "edit") {
      if (!this.box) throw new Problem("There is no box yet: draw one on the photo, or type its numbers.");
      fields.boxes = [this.box];
    }
    if (way === "outpaint") {
      SIDES.forEach((side, i) => { fields[side] = this.sides[i].checked ? this.amounts?.[side] ?? this.amount.value : 0; });
      if (!SIDES.some(side => fields[side])) throw new Problem("Choose at least one side to extend.");
    }
    if (way === "vary") fields.strength = this.strength.value;
    return { path: `v1/${way}`, fields, files };
  }

  async run() {
    if (this.running) { this.running.abort(); return; }
    const control = new AbortController(), begun = performance.now(), way = this.way.value;
    const call = await this.call();
    this.running = control;
    this.apply.textContent = "Stop";
    this.apply.classList.add("stop");
    const steps = call.fields.steps ?? this.sampler.base(call.fields.policy ?? this.world.card.sampler.policy).steps;
    this.say("Starting…");
    try {
      const answer = await stream(call, {
        queued: ({ place }) => this.say(place > 1 ? `Number ${place} in line` : "Starting…"),
        progress: ({ step }) => this.say(`Step ${step % steps + 1} of ${steps}`),
      }, control.signal);
      await this.show(answer, call, way);
      const guessed = answer.class_guess ? ` · Guessed class: ${this.world.classes.name(answer.class_guess.number)}` : "";
      this.say([`Done in ${((performance.now() - begun) / 1000).toFixed(1)} s${guessed}`, ...answer.notes].join(" · "));
    } catch (error) {
      if (error.name === "AbortError") this.say("Stopped."); else throw error;
    } finally {
      this.running = null;
      this.apply.textContent = "Apply";
      this.apply.classList.remove("stop");
    }
  }

  // The result takes the photo's place.
  async show(answer, call, way) {
    const results = answer.images.map(({ image, index }) => ({ image, index })), label = answer.class_guess?.number ?? call.fields.class;
    const stem = `${slug(this.photo.name.replace(/\.[^.]*$/, ""))}-${DONE[way]}-${slug(this.world.classes.name(typeof label === "number" ? label : null))}-seed${call.fields.seed}`;
    const name = result => `${stem}${result.index ? `-${result.index}` : ""}.png`;
    let current = results[0];
    const after = h("img", { className: "after", alt: "The result", draggable: false }), before = h("img", { className: "before", alt: "The photo before", draggable: false });
    const range = h("input", { type: "range", min: 0, max: 100, value: 0, ariaLabel: "Show the photo before" });
    const pair = h("div", { className: "pair" }, after, before);
    const cover = share => { before.style.clipPath = `inset(0 ${100 - share}% 0 0)`; pair.style.setProperty("--at", `${share}%`); pair.classList.toggle("split", share > 0); };
    range.addEventListener("input", () => cover(+range.value));
    pair.addEventListener("pointerdown", () => cover(100));
    for (const name of ["pointerup", "pointerleave", "pointercancel"]) pair.addEventListener(name, () => cover(+range.value));
    const choose = async result => {
      current = result;
      after.src = source(result.image);
      await after.decode();
      pair.style.aspectRatio = `${after.naturalWidth} / ${after.naturalHeight}`;
      pair.style.setProperty("--ratio", after.naturalWidth / after.naturalHeight);
    };
    await choose(current);
    before.src = this.view.src;
    // An extended or remixed picture does not lie over the photo.
    const lies = way === "inpaint" || way === "edit";
    before.hidden = range.hidden = !lies;
    cover(0);
    const act = (text, run) => h("button", { type: "button", onclick: () => this.attempt(run) }, text);
    const blob = () => new Blob([bytes(current.image)], { type: "image/png" });
    this.outcome.replaceChildren(pair, lies ? h("label", { className: "line reveal" }, h("span", {}, "Result"), range, h("span", {}, "Before")) : range,
      ...(results.length > 1 ? [h("div", { className: "variants" }, ...results.map((result, i) => h("button", { type: "button", ariaLabel: `Result ${i + 1}`, onclick: () => choose(result) }, h("img", { src: source(result.image), alt: "" }))))] : []),
      h("div", { className: "line" }, act("Back to the photo", () => this.clean()), act("Edit this result", () => this.open(blob(), name(current))),
        ...(way === "outpaint" ? [] : [act("How it formed", () => this.inside({ ...call, fields: { ...call.fields, class: label, num_images: 1, first_index: current.index, return_trace: true } }, this.photo.name, name(current)))]),
        act("Save", () => save(blob(), name(current)))));
    this.drop.hidden = this.board.hidden = true;
    this.outcome.hidden = false;
  }

  // ---- From a saved PNG.

  async restore(settings, label, changed, name) {
    if (!this.photo || this.photo.sha256 !== settings.photo_sha256) {
      this.pending = { settings, label, changed, name };
      throw new Problem(`${name} was made from ${settings.photo ?? "a photo"}: choose that photo now, and its settings follow.`);
    }
    for (const [key, value] of Object.entries(UNSET))
      if (key in settings && JSON.stringify(settings[key]) !== JSON.stringify(value))
        throw new Problem(`${name} was made with ${key} ${JSON.stringify(settings[key])}, which this page cannot set; use “maskgit ${settings.command}”.`);
    const way = settings.command;
    let picture = null;
    if (way === "inpaint") {
      if (!settings.mask_png) throw new Problem(`${name} does not hold its mask; paint it again.`);
      picture = await toPicture(settings.mask_png);
    }
    this.way.value = way;
    this.label.value = label == null ? "" : this.world.classes.name(label);
    this.sampler.fill(changed);
    this.sampler.holdSeed(String(settings.seed ?? 0), true);
    this.first = settings.index ?? 0;
    this.count.value = 1;
    if (way === "inpaint") {
      const { width, height } = this.canvas, context = this.canvas.getContext("2d");
      context.globalCompositeOperation = "source-over";
      context.clearRect(0, 0, width, height);
      context.drawImage(picture, 0, 0, width, height);
      const pixels = context.getImageData(0, 0, width, height), { data } = pixels;
      const red = [1, 3, 5].map(i => parseInt(COLOUR.slice(i, i + 2), 16));
      for (let i = 0; i < data.length; i += 4) data.set([...red, data[i] > 127 ? 255 : 0], i);
      context.putImageData(pixels, 0, 0);
      this.grow.value = settings.dilate ?? 0;
      this.exact = picture.width === this.photo.width && picture.height === this.photo.height ? new Blob([bytes(settings.mask_png)], { type: "image/png" }) : null;
    }
    if (way === "edit") {
      const boxes = settings.boxes ?? settings.box;
      if (boxes?.length !== 1) throw new Problem(`${name} was made with several boxes, but this page draws one; use “maskgit edit”.`);
      this.box = boxes[0];
    }
    if (way === "outpaint") {
      SIDES.forEach((side, i) => { this.sides[i].checked = settings[side] > 0; });
      this.amounts = Object.fromEntries(SIDES.map(side => [side, settings[side]]));
      this.amount.value = Math.max(...Object.values(this.amounts));
    }
    if (way === "vary") this.strength.value = settings.strength;
    this.changed();
    this.say(`Settings loaded from ${name}; Apply makes the picture again.`);
  }

  // ---- A reload comes back to the same state.

  remember() {
    if (!this.photo || !this.database) return;
    clearTimeout(this.saving);
    this.saving = setTimeout(() => {
      const { width, height } = this.canvas, mask = this.canvas.getContext("2d").getImageData(0, 0, width, height);
      const state = { photo: this.photo, way: this.way.value, box: this.box, label: this.label.value, mask };
      this.database.then(base => base.transaction("edit", "readwrite").objectStore("edit").put(state, this.world.card.name)).catch(() => {});
    }, 300);
  }

  async remembered() {
    this.database = new Promise((done, fail) => {
      const asked = indexedDB.open("maskgit", 1);
      asked.onupgradeneeded = () => asked.result.createObjectStore("edit");
      asked.onsuccess = () => done(asked.result);
      asked.onerror = () => fail(asked.error);
    });
    try {
      const base = await this.database;
      const state = await new Promise((done, fail) => {
        const asked = base.transaction("edit").objectStore("edit").get(this.world.card.name);
        asked.onsuccess = () => done(asked.result);
        asked.onerror = () => fail(asked.error);
      });
      if (!state || this.photo) return;
      await this.open(state.photo.file, state.photo.name);
      this.way.value = state.way;
      this.label.value = state.label;
      this.box = state.box;
      this.canvas.getContext("2d").putImageData(state.mask, 0, 0);
      this.changed();
    } catch { /* Private windows keep nothing. */ }
  }
}
