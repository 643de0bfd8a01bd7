// Draws a box while the pointer is down, in whole pixels of the photo; then makes it the value and triggers "submit".
let from = null;

const place = (event) => {
  const seen = element.querySelector(".boxer").getBoundingClientRect();
  const [width, height] = props.size;
  const within = (value, high) => Math.min(Math.max(value, 0), high);
  return [
    within((event.clientX - seen.left) / seen.width * width, width),
    within((event.clientY - seen.top) / seen.height * height, height),
  ];
};

const between = (a, b) => {
  const left = Math.floor(Math.min(a[0], b[0])), top = Math.floor(Math.min(a[1], b[1]));
  const right = Math.ceil(Math.max(a[0], b[0])), bottom = Math.ceil(Math.max(a[1], b[1]));
  return [left, top, right - left, bottom - top];
};

const draw = ([left, top, width, height]) => {
  const box = element.querySelector(".boxer i"), [w, h] = props.size;
  box.hidden = false;
  box.style.left = `${100 * left / w}%`;
  box.style.top = `${100 * top / h}%`;
  box.style.width = `${100 * width / w}%`;
  box.style.height = `${100 * height / h}%`;
};

element.addEventListener("pointerdown", (event) => {
  if (!event.target.closest(".boxer")) return;
  event.preventDefault();
  element.setPointerCapture(event.pointerId);
  from = place(event);
});
element.addEventListener("pointermove", (event) => {
  if (from) draw(between(from, place(event)));
});
element.addEventListener("pointerup", (event) => {
  if (!from) return;
  const box = between(from, place(event));
  from = null;
  if (!box[2] || !box[3]) return;
  props.value = box;
  trigger("submit");
});
element.addEventListener("pointercancel", () => { from = null; });
