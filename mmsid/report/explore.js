// The SID tree, and the search for an item and its SID neighbours.

let chosen = null; // the row of the item shown in the search section

const under = (prefix) => rowsAll().filter((row) => prefix.every((code, level) => method.codes[row][level] === code));

function branchCard(prefix, rows, total) {
  const titles = [...new Set(rows.slice(0, 12).map(titleOf))].slice(0, 2);
  pictures ??= read("pictures");
  const shown = rows.filter((row) => pictures[row]).slice(0, 4);
  return make("button", { type: "button", className: "branch", "data-branch": prefix.join("."), onclick: () => showBranch(prefix, true) },
    make("span", { className: "top" }, sid(prefix),
      make("span", { className: "quiet" }, `${amount(rows.length, "item")}, ${percent(rows.length / total)}`)),
    make("span", { className: "common", dir: "auto" }, common(rows, prefix.length)),
    shown.length ? make("span", { className: "mosaic" }, ...shown.map(picture)) : null,
    ...titles.map((title) => make("span", { className: "words clamped", dir: "auto" }, title)));
}

/** Show a branch of the tree: breadcrumbs, sub-branches (largest first) and items. */
function showBranch(prefix, focus = false) {
  const rows = under(prefix);
  const crumbs = [make("button", { type: "button", onclick: () => showBranch([], true) }, "all items")];
  prefix.forEach((code, level) => {
    crumbs.push(make("button", { type: "button", onclick: () => showBranch(prefix.slice(0, level + 1), true) }, token(level, code)));
  });
  crumbs.at(-1).setAttribute("aria-current", "location");
  $("crumbs").replaceChildren(...crumbs, make("span", { className: "quiet", role: "status" }, amount(rows.length, "item")));
  const children = new Map();
  if (prefix.length < method.sizes.length) {
    for (const row of rows) {
      const code = method.codes[row][prefix.length];
      if (!children.has(code)) children.set(code, []);
      children.get(code).push(row);
    }
  }
  const sorted = [...children].sort((a, b) => b[1].length - a[1].length || a[0] - b[0]);
  fill($("branches"), sorted, ([code, below]) => branchCard([...prefix, code], below, rows.length), 24);
  if (prefix.length) {
    const list = make("ul", { className: "cards" });
    $("leaves").replaceChildren(make("h3", {}, "Items under ", sid(prefix)), list);
    fill(list, rows, (row) => itemCard(row, sidOf(row, { same: prefix.length })), 12);
  } else $("leaves").replaceChildren();
  if (focus) crumbs.at(-1).focus();
}

let haystack = null;

function search(text) {
  haystack ??= rowsAll().map((row) => `${titleOf(row)} ${data.items.id[row]} ${data.items.caption[row]}`.toLowerCase());
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const rows = words.length ? rowsAll().filter((row) => words.every((word) => haystack[row].includes(word))) : [];
  const whole = text.trim().toLowerCase();
  const rank = (row) => (data.items.id[row].toLowerCase() === whole ? 0 : titleOf(row).toLowerCase().includes(whole) ? 1 : 2);
  rows.sort((a, b) => rank(a) - rank(b) || a - b);
  $("found-count").textContent = words.length ? `${amount(rows.length, "item")} found` : "";
  fill($("found"), rows, (row) => itemCard(row), 6);
  showFound(true);
}

/** Show the search results, or, when an item is chosen, the button that returns to them. */
function showFound(open) {
  $("found-list").hidden = !open;
  $("back").hidden = open || !$("found").children.length;
}

/** Show one item and the items that share a prefix with it, longest prefix first. */
function choose(row, scroll = true) {
  chosen = row;
  const { id, title, caption, interest } = data.items;
  const facts = [["id", id[row]], ["caption", caption[row]], ["interests", interest[row]], ["category", pathOf(row).join(" › ")]];
  if (method.raw[row]) facts.push(["raw codes", sid(method.raw[row])]);
  const self = make("div", { className: "self" }, picture(row), make("div", {},
    make("h3", { dir: "auto", tabIndex: -1 }, title[row] || id[row]), sidOf(row),
    make("dl", {}, ...facts.flatMap(([name, value]) => (value ? [make("dt", {}, name), make("dd", { dir: "auto" }, value)] : [])))));
  $("chosen").replaceChildren(self);
  if (scroll) showFound(false);
  const groups = method.sizes.map(() => []);
  for (const other of rowsAll()) {
    const same = commonPrefix(method.codes[row], method.codes[other]);
    if (same && other !== row) groups[same - 1].push(other);
  }
  for (let same = groups.length; same > 0; same -= 1) {
    const rows = groups[same - 1];
    if (!rows.length) continue;
    const what = same === groups.length ? "the whole SID" : `${amount(same, "code")} of ${groups.length}`;
    const list = make("ul", { className: "cards", "data-common": same });
    const prefix = sid(method.codes[row].slice(0, same), { same });
    $("chosen").append(make("h3", {}, `Shares ${what} `, prefix, ` ${amount(rows.length, "item")}`), list);
    fill(list, rows, (other) => itemCard(other, sidOf(other, { same })), 6);
  }
  if (!groups.some((rows) => rows.length)) $("chosen").append(make("p", { className: "quiet" }, "No other SID begins with this code."));
  if (scroll) {
    $("search").scrollIntoView();
    self.querySelector("h3").focus({ preventScroll: true });
  }
}

$("back")?.addEventListener("click", () => {
  showFound(true);
  $("found").querySelector("button").focus();
});

/** The item that is shown first: an item of the largest branch, with a picture if possible. */
function example() {
  const branches = new Map();
  for (const row of rowsAll()) {
    const branch = method.codes[row].slice(0, -1).join(".");
    if (!branches.has(branch)) branches.set(branch, []);
    branches.get(branch).push(row);
  }
  const largest = [...branches.values()].reduce((best, rows) => (rows.length > best.length ? rows : best), []);
  pictures ??= read("pictures");
  return largest.find((row) => pictures[row]) ?? largest[0];
}

let typing = 0;
$("query")?.addEventListener("input", (event) => {
  clearTimeout(typing);
  typing = setTimeout(search, 120, event.target.value);
});
