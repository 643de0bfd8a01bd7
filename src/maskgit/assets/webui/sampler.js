// The settings under "Advanced", and how recorded settings become fields.
import { h, slider, randomSeed } from "./ui.js";

const ORDERS = {
  confidence: "Surest parts first", redraw: "Surest first, drawn again", random: "In random order", halton: "Spread evenly", mdlm: "By chance",
  remdm: "By chance, with corrections", entropy_bounded: "As many as are sure", stable: "What stays the same",
  moment: "A part at a time", self_critic: "Doubtful parts again",
};
const order = name => ORDERS[name] ?? name.replace(/_/g, " ");
const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);

export class Sampler {
  // world: { card, policies, settings, schedules }.
  constructor(world, { seeded = true } = {}) {
    this.world = world;
    this.element = h("div", { className: "sampler" });
    const { settings, card } = world;
    const range = (name, label, max, step) => slider(label, {
      min: settings[name].low, max: Math.min(max, settings[name].high), step, value: card.sampler[name], help: settings[name].help,
    });
    if (seeded) {
      this.seed = h("input", { type: "text", inputMode: "numeric", pattern: "[0-9]{1,20}", ariaLabel: "Seed", value: randomSeed() });
      this.locked = h("input", { type: "checkbox" });
      this.seed.addEventListener("change", () => { this.locked.checked = true; });
      this.element.append(h("div", { className: "field" }, h("div", { className: "line" }, h("span", {}, "Seed"), this.seed,
        h("label", { className: "check" }, this.locked, "Lock")), h("p", { className: "help" }, "The same seed and settings make the same picture.")));
    }
    this.policy = h("select", { ariaLabel: "Drawing order", onchange: () => this.fill({ policy: this.policy.value }) },
      ...world.policies.map(one => h("option", { value: one.name }, order(one.name))));
    this.about = h("p", { className: "help" });
    this.options = h("div", { className: "options" });
    this.steps = range("steps", "Steps", 64, 1);
    this.guidance = range("guidance_scale", "Guidance", 10, 0.1);
    this.temperature = range("temperature", "Temperature", 2, 0.05);
    this.choice = range("choice_temperature", "Order randomness", 20, 0.1);
    this.schedule = h("input", { type: "text", ariaLabel: "Mask schedule" });
    this.element.append(
      h("div", { className: "field" }, h("div", { className: "line" }, h("span", {}, "Drawing order"), this.policy), this.about, this.options),
      this.steps.element, ...(card.without_class ? [this.guidance.element] : []), this.temperature.element, this.choice.element,
      h("div", { className: "field" }, h("div", { className: "line" }, h("span", {}, "Mask schedule"), this.schedule),
        h("p", { className: "help" }, `How many parts stay open as drawing goes on: ${world.schedules.join(", ")}, or powX.`)),
      h("button", { type: "button", className: "quiet", onclick: () => this.fill({}) }, "Reset to defaults"),
    );
    this.fill({});
  }

  get own() { return this.world.card.sampler; }
  base(policy) { return policy === this.own.policy ? this.own : this.world.policies.find(one => one.name === policy)?.sampler ?? this.own; }

  // Show settings; what is not given is the default of the policy.
  fill(given) {
    const base = this.base(given.policy ?? this.own.policy);
    const all = Object.fromEntries(Object.keys(this.own).map(name => [name, given[name] ?? base[name]]));
    this.all = all;
    this.policy.value = all.policy;
    const card = this.world.policies.find(one => one.name === all.policy);
    this.about.textContent = card?.about ?? "";
    this.options.replaceChildren(...Object.entries(card?.parameters ?? {}).map(([name, fallback]) => {
      const value = all.policy_options[name] ?? fallback;
      const input = typeof fallback === "boolean" ? h("input", { type: "checkbox", checked: value })
        : h("input", { type: typeof fallback === "number" ? "number" : "text", step: "any", value: value ?? "" });
      input.dataset.name = name;
      input.kind = typeof fallback;
      input.fallback = fallback;
      return h("label", { className: "line" }, h("span", {}, name.replace(/_/g, " ")), input);
    }));
    this.steps.value = all.steps;
    this.guidance.value = all.guidance_scale;
    this.temperature.value = all.temperature;
    this.choice.value = all.choice_temperature;
    this.schedule.value = all.mask_schedule;
  }

  // What differs from the defaults of the chosen policy.
  get value() {
    const policy = this.policy.value, options = {};
    for (const input of this.options.querySelectorAll("input")) {
      const value = input.kind === "boolean" ? input.checked : input.kind === "number" ? +input.value : input.value;
      if (value !== input.fallback && input.value !== "") options[input.dataset.name] = value;
    }
    const all = { ...this.all, policy, policy_options: options, steps: this.steps.value, guidance_scale: this.guidance.value,
      temperature: this.temperature.value, choice_temperature: this.choice.value, mask_schedule: this.schedule.value.trim() };
    return this.changed(all);
  }

  changed(all) {
    const base = this.base(all.policy);
    const changed = Object.keys(this.own).filter(name => name !== "policy" && name in all && all[name] != null && !same(all[name], base[name]));
    const kept = Object.fromEntries(changed.map(name => [name, all[name]]));
    // Tables say how many steps there are, and hold null where a curve does.
    return all.policy && all.policy !== this.own.policy ? { policy: all.policy, ...kept } : kept;
  }

  takeSeed() {
    if (!this.locked.checked) this.seed.value = randomSeed();
    return this.seed.value.trim();
  }

  holdSeed(seed, locked) {
    this.seed.value = seed;
    this.locked.checked = locked;
  }
}
