// How a picture formed, and the same picture with other settings.
import { post } from "./api.js";
import { Sampler } from "./sampler.js";
import { $, bytes, h, reduced, save, source } from "./ui.js";

function open(title, ...content) {
  const dialog = $("#dialog");
  dialog.replaceChildren(h("div", { className: "head" }, h("h2", { id: "dialog-title" }, title),
    h("button", { type: "button", className: "quiet", onclick: () => dialog.close() }, "Close")), ...content);
  dialog.setAttribute("aria-labelledby", "dialog-title");
  if (!dialog.open) dialog.showModal();
  return dialog;
}

const say = (element, error) => {
  element.classList.add("wrong");
  element.textContent = error.message;
};

// Light for the first step to dark for the last; and pale for a guess to strong for certainty.
const cold = share => `hsl(${262 - 40 * share} 50% ${90 - 62 * share}%)`;
const warm = share => `hsl(${44 - 26 * share} 78% ${92 - 46 * share}%)`;

function map(title, about, trace, share, shade, text, told) {
  const rows = trace.fixed_at.length, columns = trace.fixed_at[0].length;
  const cells = trace.fixed_at.flatMap((row, y) => row.map((_, x) => {
    const cell = h("span", { tabIndex: x || y ? -1 : 0 }, columns <= 12 ? text(y, x) : "");
    cell.style.background = shade(share(y, x));
    // Text stays legible on every shade.
    cell.classList.toggle("dark", shade === cold && share(y, x) > 0.45);
    const tell = () => { told.textContent = describe(trace, y, x); };
    cell.addEventListener("pointerenter", tell);
    cell.addEventListener("focus", tell);
    return cell;
  }));
  const grid = h("div", { className: "map", role: "group", ariaLabel: title }, ...cells);
  grid.style.setProperty("--columns", columns);
  grid.addEventListener("keydown", event => {
    const move = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
    const next = move && cells[cells.indexOf(document.activeElement) + move];
    if (!next) return;
    event.preventDefault();
    for (const cell of cells) cell.tabIndex = cell === next ? 0 : -1;
    next.focus();
  });
  return h("figure", {}, h("figcaption", {}, h("strong", {}, title), h("span", {}, about)), grid);
}

function describe(trace, y, x) {
  const where = `Row ${y + 1}, column ${x + 1}: code ${trace.tokens[y][x]}`;
  const step = trace.fixed_at[y][x];
  return step < 0 ? `${where}, known from the start` : `${where}, fixed at step ${step + 1} of ${trace.steps}, ${(100 * trace.confidence[y][x]).toFixed(1)} % sure`;
}

// call asks for one picture with its trace.
export async function inside(call, name, file) {
  const status = h("p", { className: "status", role: "status" }, "Looking inside…");
  const dialog = open(`How it formed: ${name}`, status);
  let trace, picture;
  try {
    [picture] = (await post(call)).images;
    trace = picture.trace;
    if (!trace) throw new Error("This picture was made of several parts, so there is no single order to show.");
  } catch (error) { say(status, error); return; }
  const canvas = h("canvas", { role: "img", ariaLabel: `${name}, forming` });
  const frames = await Promise.all(trace.frames.map(async data => createImageBitmap(new Blob([bytes(data)]))));
  const { width, height } = frames[0];
  Object.assign(canvas, { width: 384, height: Math.round(384 * height / width) });
  const context = canvas.getContext("2d");
  const rows = trace.fixed_at.length, columns = trace.fixed_at[0].length;
  const range = h("input", { type: "range", min: 0, max: trace.steps, value: trace.steps, ariaLabel: "Step" });
  const label = h("output");
  const draw = step => {
    context.imageSmoothingQuality = "high";
    context.drawImage(frames[Math.max(0, step - 1)], 0, 0, canvas.width, canvas.height);
    context.fillStyle = step ? "rgb(228 224 216 / 82%)" : "rgb(228 224 216)";
    const wide = canvas.width / columns, high = canvas.height / rows;
    trace.fixed_at.forEach((row, y) => row.forEach((at, x) => { if (at >= step) context.fillRect(x * wide, y * high, wide, high); }));
    range.value = step;
    label.textContent = step ? `Step ${step} of ${trace.steps}` : "Nothing yet";
  };
  range.addEventListener("input", () => draw(+range.value));
  let timer;
  const play = () => {
    clearInterval(timer);
    let step = 0;
    timer = setInterval(() => { draw(step); if (step++ >= trace.steps || !dialog.open) clearInterval(timer); }, 220);
  };
  const told = h("p", { className: "help", ariaLive: "polite" }, "Point at a part, or use the arrow keys, to read its code, step and probability.");
  const stem = file.replace(/\.png$/, "");
  status.replaceWith(h("div", { className: "inside" },
    h("figure", {}, canvas, h("div", { className: "line" }, h("button", { type: "button", onclick: play }, "Play"), range, label)),
    map("Drawn when", "Early parts are light, late ones dark.", trace,
      (y, x) => Math.max(0, trace.fixed_at[y][x]) / Math.max(1, trace.steps - 1), cold, (y, x) => String(trace.fixed_at[y][x] + 1), told),
    map("How sure", "Percent, when the part was fixed.", trace,
      (y, x) => Math.max(0, 1 + Math.log10(Math.max(1e-3, trace.confidence[y][x])) / 3), warm, (y, x) => String(Math.round(100 * trace.confidence[y][x])), told)),
  told, h("div", { className: "line end" },
    h("button", { type: "button", onclick: () => save(new Blob([bytes(trace.explanation)]), `${stem}-explained.png`) }, "Save explanation"),
    h("button", { type: "button", onclick: () => save(new Blob([bytes(trace.animation)]), `${stem}-forming.gif`) }, "Save animation")));
  draw(trace.steps);
  if (!reduced()) play();
}

// call gives the request for the picture with other settings.
export function compare(world, call, settings, name) {
  const sides = ["As it is", "Instead"].map(title => {
    const image = h("img", { alt: `${name}: ${title.toLowerCase()}` });
    const note = h("p", { className: "help", role: "status" });
    return { image, note, element: h("figure", {}, h("figcaption", {}, h("strong", {}, title)), image, note) };
  });
  const other = new Sampler(world, { seeded: false });
  other.fill({ policy: world.card.sampler.policy === "halton" ? "confidence" : "halton" });
  const show = async (side, given) => {
    const begun = performance.now();
    side.note.textContent = "Drawing…";
    side.note.classList.remove("wrong");
    try {
      const answer = await post(await call(given));
      side.image.src = source(answer.images[0].image);
      const said = Object.entries(given).map(([key, value]) => `${key.replace(/_/g, " ")} ${typeof value === "object" ? JSON.stringify(value) : value}`);
      side.note.textContent = `${said.join(", ") || "the defaults"} · ${((performance.now() - begun) / 1000).toFixed(1)} s`;
    } catch (error) { say(side.note, error); }
  };
  open(`Compare: ${name}`, h("div", { className: "compare" }, sides[0].element, sides[1].element,
    h("div", { className: "panel" }, h("p", { className: "help" }, "The same class and seed, drawn in another way."), other.element,
      h("button", { type: "button", className: "primary", onclick: () => show(sides[1], other.value) }, "Compare"))));
  show(sides[0], settings).then(() => show(sides[1], other.value));
}
