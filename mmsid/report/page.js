"use strict";
// Shared by all explorers: the data, elements made from text only, and the display of items and SIDs.

const read = (id) => JSON.parse(document.getElementById(id).textContent);
const data = read("data");
const $ = (id) => document.getElementById(id);
let pictures = null; // parsed on first use, because they can be megabytes
let method = data && data.methods[data.methods.length - 1];

/** Create an element. `options` are properties (`data-` and `aria-` names are attributes), children are nodes or text, never markup. */
function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

const amount = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)}%`;
const token = (level, code) => `${String.fromCharCode(97 + level)}_${code}`;
const rowsAll = () => [...data.items.id.keys()];
const titleOf = (row) => data.items.title[row] || data.items.id[row];
const pathOf = (row) => data.categories.paths[data.categories.of[row]];

/** Length of the common prefix of two SIDs. */
function commonPrefix(one, other) {
  let length = 0;
  while (length < one.length && one[length] === other[length]) length += 1;
  return length;
}

/** A SID as chips. The first `same` codes are filled, and codes that differ from `before` are outlined. */
function sid(codes, { same = 0, before = null, suffix = -1 } = {}) {
  const chips = codes.map((code, level) => {
    const className = level < same ? "same" : before && before[level] !== code ? "changed" : "";
    return make("span", { className }, token(level, code));
  });
  if (suffix >= 0) chips.push(make("span", { title: "suffix: number within its bucket" }, `#${suffix}`));
  return make("span", { className: "codes" }, ...chips);
}

const sidOf = (row, options = {}) => sid(method.codes[row], { suffix: method.suffix ? method.suffix[row] : -1, ...options });

function picture(row) {
  pictures ??= read("pictures");
  const found = pictures[row];
  if (!found) return make("span", { className: "picture" });
  return make("img", { className: "picture", alt: "", loading: "lazy", decoding: "async", src: `data:image/webp;base64,${found}` });
}

/** Card of an item. A click shows the item in the search section. */
function itemCard(row, chips = sidOf(row), note = null) {
  const [words, interest, path] = [data.items.caption[row], data.items.interest[row], pathOf(row)];
  const text = make("span", {},
    make("span", { className: "title clamped", dir: "auto" }, titleOf(row)), chips,
    note && make("span", { className: "words" }, note),
    words && make("span", { className: "words clamped caption", dir: "auto" }, words),
    interest && make("span", { className: "words clamped", dir: "auto" }, interest),
    path.length ? make("span", { className: "words", dir: "auto" }, path.join(" › ")) : null);
  const button = make("button", { type: "button", className: "item", onclick: () => choose(row) }, picture(row), text);
  return make("li", { "data-row": row }, button);
}

/** Render `list` into `parent`, `step` elements at a time, with a button for more after it. `parent` must be in the document. */
function fill(parent, list, render, step = 24) {
  parent.replaceChildren();
  if (parent.nextElementSibling?.classList.contains("more")) parent.nextElementSibling.remove();
  const more = make("button", { type: "button", className: "more" });
  let shown = 0;
  const next = () => {
    const first = shown;
    parent.append(...list.slice(shown, shown + step).map(render));
    shown = Math.min(shown + step, list.length);
    if (first) [parent.children[first], ...parent.children[first].children].find((element) => element.matches("button"))?.focus();
    if (shown < list.length) more.textContent = `Show more (${(list.length - shown).toLocaleString("en")} left)`;
    else more.remove();
  };
  next();
  if (shown < list.length) {
    more.onclick = next;
    parent.after(more);
  }
}

const WORD = /\p{L}{3,}/gu;

/** Most frequent category of the items at a depth, or words of the titles for items without categories. */
function common(rows, depth, most = 1) {
  const counts = new Map();
  for (const row of rows) {
    const path = pathOf(row);
    const names = path.length ? [path[Math.min(depth, path.length) - 1]] : new Set(titleOf(row).toLowerCase().match(WORD) ?? []);
    for (const name of names) counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  const sorted = [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
  return sorted.slice(0, most).map(([name, count]) => `${name} ${percent(count / rows.length)}`).join(", ");
}

$("metric")?.addEventListener("change", (event) => {
  for (const table of document.querySelectorAll("[data-metric]")) table.hidden = table.dataset.metric !== event.target.value;
});
