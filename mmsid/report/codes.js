// Code usage, collisions and items moved by refinement. Draws the page for the selected method.

/** One level: a grid of cells with keyboard navigation, and a description of the selected code. */
function heatLevel(level) {
  const counts = method.counts[level];
  const total = counts.reduce((sum, count) => sum + count, 0);
  const largest = Math.max(...counts, 1);
  const used = counts.filter((count) => count > 0);
  const perplexity = Math.exp(-used.reduce((sum, count) => sum + (count / total) * Math.log(count / total), 0));
  const about = make("div", { className: "about", role: "status" });
  const show = (code) => {
    const rows = rowsAll().filter((row) => method.codes[row][level] === code);
    const frequent = rows.length ? common(rows, level + 1, 3) : "";
    const uniform = (total / counts.length).toFixed(1);
    const share = `${amount(counts[code], "item")}, ${percent(counts[code] / total)}; uniform use is ${uniform}`;
    about.replaceChildren(make("p", {}, sidToken(level, code), ` ${share}`),
      frequent ? make("p", { dir: "auto" }, `Most frequent: ${frequent}`) : make("p", {}, counts[code] ? "" : "No item has this code."),
      make("p", { className: "quiet clamped", dir: "auto" }, rows.slice(0, 3).map(titleOf).join(" · ")));
  };
  const cells = counts.map((count, code) => {
    const cell = make("div", {
      className: `cell${count === 0 ? " dead" : count > 0.7 * largest ? " strong" : ""}`, role: "option", tabIndex: code ? -1 : 0,
      "aria-selected": "false", "aria-label": `${token(level, code)}, ${amount(count, "item")}`, title: amount(count, "item"),
    }, String(code));
    cell.style.setProperty("--share", `${Math.round((90 * count) / largest)}%`);
    return cell;
  });
  const codeOf = (cell) => cells.indexOf(cell);
  const select = (code) => {
    cells.forEach((cell, other) => {
      cell.tabIndex = other === code ? 0 : -1;
      cell.setAttribute("aria-selected", String(other === code));
    });
    show(code);
  };
  const grid = make("div", { className: "cells", role: "listbox", "aria-label": `Codes of level ${level + 1}` }, ...cells);
  grid.addEventListener("mouseover", (event) => codeOf(event.target) >= 0 && select(codeOf(event.target)));
  grid.addEventListener("focusin", (event) => codeOf(event.target) >= 0 && select(codeOf(event.target)));
  grid.addEventListener("click", (event) => codeOf(event.target) >= 0 && event.target.focus());
  grid.addEventListener("keydown", (event) => {
    const current = codeOf(document.activeElement);
    const columns = Math.max(0, cells.findIndex((cell) => cell.offsetTop > cells[0].offsetTop)); // 0: there is one line only
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns };
    if (event.key in steps) cells[Math.max(0, Math.min(cells.length - 1, current + steps[event.key]))].focus();
    else if (event.key === "Enter" && level === 0 && counts[current]) showBranch([current], true);
    else return;
    event.preventDefault();
  });
  show(counts.indexOf(largest));
  const facts = `${used.length} of ${counts.length} codes used, perplexity ${perplexity.toFixed(1)}, largest ${amount(largest, "item")}`;
  const title = make("h3", {}, `Level ${level + 1} `, make("span", { className: "quiet" }, facts));
  return make("div", { className: "level" }, title, grid, about);
}

const sidToken = (level, code) => make("span", { className: "codes" }, make("span", { className: "same" }, token(level, code)));

function drawCollisions() {
  const found = method.collisions;
  const lost = (sizes) => Object.entries(sizes).reduce((sum, [size, count]) => sum + (size - 1) * count, 0);
  const copies = found.duplicates ? ` ${amount(found.duplicates, "item")} with the same content as another may share a SID.` : "";
  $("collisions-summary").textContent = `${amount(lost(found.raw), "item")} without a unique SID before collision handling, ` +
    `${amount(lost(found.published), "item")} after it. ` +
    `${amount(found.changed, "item")} with published codes that differ from the raw codes.${copies}`;
  const sizes = [...new Set([...Object.keys(found.raw), ...Object.keys(found.published)])].sort((a, b) => a - b);
  const head = make("tr", {}, ...["items in a bucket", ...sizes].map((name) => make("th", { scope: "col" }, name)));
  const line = (name, of) => {
    const cells = sizes.map((size) => make("td", {}, (of[size] ?? 0).toLocaleString("en")));
    return make("tr", {}, make("th", { scope: "row" }, name), ...cells);
  };
  const rows = make("tbody", {}, line("buckets of raw codes", found.raw), line("buckets of published SIDs", found.published));
  const table = make("table", { className: "plain" }, make("thead", {}, head), rows);
  $("collisions-sizes").replaceChildren(
    sizes.length ? make("div", { className: "wide", tabIndex: 0, role: "region", "aria-label": "Buckets by size" }, table) : "");
  fill($("buckets"), found.buckets, (rows) => {
    const raw = method.raw[rows[0]] ?? method.codes[rows[0]];
    const list = make("ul", { className: "cards" });
    const bucket = make("div", { className: "bucket" }, make("div", {}, "Raw codes ", sid(raw), ` ${amount(rows.length, "item")}`), list);
    fill(list, rows, (row) => itemCard(row, sidOf(row, { before: raw }), method.raw[row] ? "moved to other codes" : "kept its codes"), 6);
    return bucket;
  }, 4);
}

function drawMoved() {
  const moved = data.moved;
  const facts = moved.count ? `, ${percent(moved.share_gaining)} of them with a higher reward. The mean change of the reward is ` +
    `${moved.mean_gain.toFixed(3)}, and ${amount(moved.first_level, "first code")} changed` : "";
  const part = moved.rows.length < moved.count ? ` The list shows the ${moved.rows.length} items with the largest gain.` : "";
  $("moved-summary").textContent = `${amount(moved.count, "item")}${facts}.${part}`;
  fill($("moved"), moved.rows, ({ row, before, after, gain, parts }) => {
    const move = make("span", { className: "move" }, sid(before), "→", sid(after, { before }));
    return itemCard(row, move, `reward ${gain < 0 ? "" : "+"}${gain.toFixed(3)}${parts ? ` (${parts})` : ""}`);
  }, 12);
}

/** Draw all explorers for the selected method. The chosen item is kept, and the tree is reset because its codes differ. */
function draw() {
  $("heat").replaceChildren(...method.sizes.map((_, level) => heatLevel(level)));
  drawCollisions();
  showBranch([]);
  if (data.items.id.length) choose(chosen ?? example(), false);
  if ($("query").value) search($("query").value);
}

if (data) {
  $("method").addEventListener("change", (event) => {
    method = data.methods[event.target.value];
    draw();
  });
  draw();
  if (data.moved) drawMoved();
}
