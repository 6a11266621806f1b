"use strict";
// Texts come from models and tasks: they are only ever set as text, never as HTML.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const text = row.cells[column].dataset.sort ?? row.cells[column].textContent.trim();
    const number = Number(text);
    return text !== "" && !Number.isNaN(number) ? number : text;
  };
  const compare = (a, b) => {
    if (typeof a === "number" && typeof b === "number") return a - b;
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return a.localeCompare(b);
  };
  headers.forEach((header, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = header.textContent;
    button.addEventListener("click", () => {
      const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      headers.forEach((other) => other.removeAttribute("aria-sort"));
      header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      body.append(...[...body.rows].sort((a, b) => sign * compare(key(a, column), key(b, column))));
    });
    header.replaceChildren(button);
  });
}

const episodes = JSON.parse(document.getElementById("episodes").textContent);
const viewer = document.getElementById("viewer-body");
if (viewer && episodes.length) {
  const at = (id) => document.getElementById(id);
  const usd = (value) => "$" + value.toFixed(5);
  const say = (id, text) => { at(id).textContent = text; };
  let episode = 0;
  let step = 0;

  const show = () => {
    const shown = episodes[episode];
    const now = shown.steps[step];
    say("episode-facts", `${shown.policy} on ${shown.task}: ${shown.success ? "success" : "no success"} (${shown.stop}), ` +
      `score ${shown.score}, ${shown.large_calls} of ${shown.steps.length} calls large, ${usd(shown.cost_usd)}.`);
    say("task-text", `Task: ${shown.task_text}`);
    say("position", shown.steps.length ? `Step ${step + 1} of ${shown.steps.length}` : "No steps");
    at("previous").disabled = step === 0;
    at("next").disabled = step + 1 >= shown.steps.length;
    [...at("strip").children].forEach((button, index) => {
      if (index === step) button.setAttribute("aria-current", "step"); else button.removeAttribute("aria-current");
    });
    for (const id of ["action", "observation", "reply", "view"]) say(id, now ? now[id] : "");
    say("p-large", now ? now.p_large.toFixed(2) : "");
    at("p-bar").style.width = `${now ? 100 * now.p_large : 0}%`;
    say("chosen", now ? `→ ${now.model}${now.masked ? " (budget left no choice of all models)" : ""}` : "");
    say("step-facts", now ? `${now.prompt_tokens} prompt and ${now.completion_tokens} completion tokens, ` +
      `${usd(now.cost_usd)} for this call, ${usd(now.spent_usd)} so far` : "");
  };
  const go = (to) => { step = Math.max(0, Math.min(to, episodes[episode].steps.length - 1)); show(); };
  const open = (index) => {
    episode = index;
    at("strip").replaceChildren(...episodes[index].steps.map((one, number) => {
      const button = document.createElement("button");
      const [label, bar] = [document.createElement("span"), document.createElement("i")];
      button.type = "button";
      label.textContent = String(number + 1);
      bar.style.height = `${2.6 * one.p_large}rem`;
      button.append(label, bar);
      button.title = `step ${number + 1}: ${one.model}, p(LARGE) ${one.p_large.toFixed(2)}`;
      if (one.large) button.className = "large";
      button.addEventListener("click", () => go(number));
      return button;
    }));
    go(0);
  };

  episodes.forEach((one, index) => {
    const option = document.createElement("option");
    option.value = String(index);
    option.textContent = `${one.success ? "✓" : "✗"} ${one.task} · ${one.policy}`;
    at("episode").append(option);
  });
  at("episode").addEventListener("change", (event) => open(Number(event.target.value)));
  at("previous").addEventListener("click", () => go(step - 1));
  at("next").addEventListener("click", () => go(step + 1));
  viewer.addEventListener("keydown", (event) => {
    if (event.target.tagName === "SELECT") return;
    if (event.key === "ArrowRight") go(step + 1);
    if (event.key === "ArrowLeft") go(step - 1);
  });
  viewer.hidden = false;
  open(0);
}
