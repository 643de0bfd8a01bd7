// Elements, classes by name, and files.

export const $ = (selector, root = document) => root.querySelector(selector);

export function h(tag, props = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name in made && name !== "list") made[name] = value;
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.filter(child => child != null));
  return made;
}

const PATHS = {
  paint: "M4 20c3 0 4-1 4-3a2 2 0 0 0-4 0c0 1-1 2-2 2 1 1 1 1 2 1zM9 15 20 4M11 17 21 6",
  box: "M5 5h14v14H5zM3 5h4M17 19h4M5 3v4M19 17v4",
  extend: "M8 8h8v8H8zM3 12h3M18 12h3M12 3v3M12 18v3",
  remix: "M4 7h4l8 10h4M4 17h4l2-3M14 10l2-3h4M18 5l2 2-2 2M18 15l2 2-2 2",
};

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(svg.namespaceURI, "path");
  path.setAttribute("d", PATHS[name]);
  svg.append(path);
  return svg;
}

let groups = 0;
// A row of choices, one of which holds: [[value, what is shown], …].
export function choice(parent, options, value, change) {
  const name = `choice-${groups++}`;
  for (const [key, shown] of options) {
    const input = h("input", { type: "radio", name, value: key, checked: key === value, onchange: () => change?.(key) });
    parent.append(h("label", {}, input, h("span", {}, ...[shown].flat())));
  }
  return {
    get value() { return $("input:checked", parent).value; },
    set value(key) { for (const input of parent.querySelectorAll("input")) input.checked = input.value === String(key); },
  };
}

// A number with a slider.
export function slider(label, { min, max, step, value, help }, change) {
  const number = h("input", { type: "number", min, max, step, value, ariaLabel: label });
  const range = h("input", { type: "range", min, max, step, value, ariaLabel: `${label}, slider` });
  const set = (to, told = true) => {
    if (+to > +range.max) range.max = number.max = to;
    number.value = range.value = to;
    if (told) change?.(+to);
  };
  range.addEventListener("input", () => set(range.value));
  number.addEventListener("change", () => set(number.value === "" ? value : number.value));
  const element = h("div", { className: "field" }, h("div", { className: "line" }, h("span", {}, label), number), range,
    help ? h("p", { className: "help" }, help) : null);
  return { element, get value() { return +number.value; }, set value(to) { set(to, false); } };
}

const plain = text => text.toLowerCase().replace(/[_-]/g, " ").trim();

function distance(a, b) {
  let row = [...Array(b.length + 1).keys()];
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++)
      next[j] = Math.min(row[j] + 1, next[j - 1] + 1, row[j - 1] + (a[i - 1] !== b[j - 1]));
    row = next;
  }
  return row[b.length];
}

// The model's classes: what each is called, and which one is meant.
export class Classes {
  constructor(listed) {
    this.listed = listed.map(({ number, name }) => ({ number, name: name?.split(",")[0] ?? `class ${number}`, all: (name ?? `class ${number}`).split(",").map(plain) }));
    const seen = new Map();
    for (const one of this.listed) seen.set(plain(one.name), (seen.get(plain(one.name)) ?? 0) + 1);
    for (const one of this.listed) if (seen.get(plain(one.name)) > 1) one.name = `${one.name} (${one.number})`;
  }

  name(number) { return number == null ? "no class" : this.listed[number].name; }

  matching(text) {
    const wanted = plain(text);
    return this.listed.filter(one => one.all.some(name => name.includes(wanted)) || plain(one.name).includes(wanted));
  }

  // The class that a text means, or else { near }, those that it may mean.
  find(text) {
    const wanted = plain(text.replace(/^name:/, ""));
    const number = /^(?:number:)?(\d+)$/.exec(wanted)?.[1];
    const whole = this.listed.filter(one => one.all.includes(wanted) || plain(one.name) === wanted);
    if (whole.length === 1) return whole[0];
    if (!whole.length && number !== undefined && this.listed[number]) return this.listed[number];
    const found = whole.length ? whole : this.matching(text);
    if (found.length === 1) return found[0];
    const near = found.length ? found : this.listed
      .map(one => ({ one, far: Math.min(...one.all.map(name => distance(wanted, name))) }))
      .filter(({ far }) => far <= Math.max(2, wanted.length / 3)).sort((a, b) => a.far - b.far).map(({ one }) => one);
    return { near: near.slice(0, 4) };
  }
}

export const source = data => `data:image/png;base64,${data}`;
export const bytes = data => Uint8Array.from(atob(data), c => c.charCodeAt(0));

export function save(blob, name) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

function* chunks(data) {
  const view = new DataView(data.buffer, data.byteOffset);
  for (let at = 8; at < data.length;) {
    const length = view.getUint32(at) + 12;
    yield { type: String.fromCharCode(...data.subarray(at + 4, at + 8)), data: data.subarray(at, at + length) };
    at += length;
  }
}

// A PNG four times as large; its texts (settings, origin) stay, a signature of the smaller file does not.
export async function enlarged(data, times) {
  const small = await createImageBitmap(new Blob([data]));
  const canvas = h("canvas", { width: small.width * times, height: small.height * times });
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  const large = new Uint8Array(await (await new Promise(done => canvas.toBlob(done))).arrayBuffer());
  const texts = [...chunks(data)].filter(({ type }) => ["tEXt", "iTXt", "zTXt"].includes(type)).map(({ data }) => data);
  const [head] = chunks(large);
  const end = 8 + head.data.length;
  return new Blob([large.subarray(0, end), ...texts, large.subarray(end)], { type: "image/png" });
}

export const slug = text => text.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "") || "picture";
export const randomSeed = () => String(crypto.getRandomValues(new Uint32Array(1))[0]);
export const reduced = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
