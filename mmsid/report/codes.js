// Code usage, collisions, and what refinement moved; then the page is drawn for the arm that is chosen.

/** One level: a row of cells to walk with the arrow keys, and what the code under the cursor stands for. */
function heatLevel(level) {
  const counts = arm.counts[level];
  const total = counts.reduce((sum, count) => sum + count, 0);
  const largest = Math.max(...counts, 1);
  const used = counts.filter((count) => count > 0);
  const perplexity = Math.exp(-used.reduce((sum, count) => sum + (count / total) * Math.log(count / total), 0));
  const about = make("div", { className: "about", role: "status" });
  const show = (code) => {
    const rows = rowsAll().filter((row) => arm.codes[row][level] === code);
    const seen = rows.length ? common(rows, level + 1, 3) : "";
    const fair = (total / counts.length).toFixed(1);
    const share = `${amount(counts[code], "item")}, ${percent(counts[code] / total)}; a fair share is ${fair}`;
    about.replaceChildren(make("p", {}, sidToken(level, code), ` ${share}`),
      seen ? make("p", { dir: "auto" }, `Most often: ${seen}`) : make("p", {}, counts[code] ? "" : "No item carries this code."),
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
  const at = (cell) => cells.indexOf(cell);
  const select = (code) => {
    cells.forEach((cell, other) => {
      cell.tabIndex = other === code ? 0 : -1;
      cell.setAttribute("aria-selected", String(other === code));
    });
    show(code);
  };
  const grid = make("div", { className: "cells", role: "listbox", "aria-label": `Codes of level ${level + 1}` }, ...cells);
  grid.addEventListener("mouseover", (event) => at(event.target) >= 0 && select(at(event.target)));
  grid.addEventListener("focusin", (event) => at(event.target) >= 0 && select(at(event.target)));
  grid.addEventListener("click", (event) => at(event.target) >= 0 && cells[at(event.target)].focus());
  grid.addEventListener("keydown", (event) => {
    const here = at(document.activeElement);
    const across = cells.findIndex((cell) => cell.offsetTop > cells[0].offsetTop);
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: across < 0 ? 0 : across, ArrowUp: across < 0 ? 0 : -across };
    if (event.key in steps) cells[Math.max(0, Math.min(cells.length - 1, here + steps[event.key]))].focus();
    else if (event.key === "Enter" && level === 0 && counts[here]) walk([here], true);
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
  const found = arm.collisions;
  const lost = (sizes) => Object.entries(sizes).reduce((sum, [size, count]) => sum + (size - 1) * count, 0);
  const twins = found.duplicates ? ` ${amount(found.duplicates, "item")} of the very same content as another may share a SID.` : "";
  $("collisions-summary").textContent = `Before collision handling ${amount(lost(found.raw), "item")} had no SID of their own, after it ` +
    `${amount(lost(found.published), "item")}; ${amount(found.changed, "item")} got other codes than the model's first choice.${twins}`;
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
    const raw = arm.raw[rows[0]] ?? arm.codes[rows[0]];
    const list = make("ul", { className: "cards" });
    const bucket = make("div", { className: "bucket" }, make("div", {}, "Raw codes ", sid(raw), ` ${amount(rows.length, "item")}`), list);
    fill(list, rows, (row) => itemCard(row, sidOf(row, { before: raw }), arm.raw[row] ? "moved to other codes" : "kept its codes"), 6);
    return bucket;
  }, 4);
}

function drawMoved() {
  const moved = data.moved;
  const facts = moved.count ? `, ${percent(moved.share_gaining)} of them to a higher reward; on average it changes by ` +
    `${moved.mean_gain.toFixed(3)}, and ${moved.first_level.toLocaleString("en")} change their first code` : "";
  const part = moved.rows.length < moved.count ? ` The ${moved.rows.length} with the largest gain:` : "";
  $("moved-summary").textContent = `${amount(moved.count, "item")}${facts}.${part}`;
  fill($("moved"), moved.rows, ({ row, before, after, gain }) => {
    const move = make("span", { className: "move" }, sid(before), "→", sid(after, { before }));
    return itemCard(row, move, `reward ${gain < 0 ? "" : "+"}${gain.toFixed(3)}`);
  }, 12);
}

/** Draw every explorer for the chosen arm: the item stays, the tree starts anew, for its codes mean something else. */
function draw() {
  $("heat").replaceChildren(...arm.sizes.map((_, level) => heatLevel(level)));
  drawCollisions();
  walk([]);
  if (data.items.id.length) choose(chosen ?? example(), false);
  if ($("query").value) search($("query").value);
}

if (data) {
  $("arm").addEventListener("change", (event) => {
    arm = data.arms[event.target.value];
    draw();
  });
  draw();
  if (data.moved) drawMoved();
}
