"use strict";
// All texts of ads enter the page as text nodes, never as markup.
const $ = (id) => document.getElementById(id);
const SOURCES = {
  semantic_id: "its Semantic ID follows from the history", embedding: "it resembles the history", co_engagement: "people engaged with both",
  words: "it shares words with the history", labels: "it shares labels with the history", popular: "it is popular", new: "it is new",
};
let about = null;
let picture = null; // the chosen file
let encoded = null; // the ad as it was encoded, for the catalogue and the history
let key = sessionStorage.getItem("mmsid-key") ?? "";

/** Create an element. `options` are properties (names with `-` are attributes), children are nodes or text, never markup. */
function make(tag, options = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

const amount = (number, noun) => `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;

/** Ask the service. Raises an Error with a text for people. */
async function ask(path, body = null) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const form = body instanceof FormData;
  if (body && !form) headers["Content-Type"] = "application/json";
  const options = body ? { method: "POST", headers, body: form ? body : JSON.stringify(body) } : { headers };
  const answer = await fetch(path, options);
  const data = await answer.json();
  if (answer.status === 401) {
    $("key-form").hidden = false;
    throw new Error("The service asks for a key.");
  }
  if (answer.status === 429) throw new Error(`The service is busy. Try again in ${answer.headers.get("Retry-After") ?? 1} s.`);
  if (!answer.ok && !data.results) throw new Error(data.detail ?? `The service answered ${answer.status}.`);
  return data;
}

/** Run an action of a form: its button is disabled, and the state says what happens. */
async function run(form, state, busy, action) {
  const button = form.querySelector("button:not([type=button])");
  button.disabled = true;
  say(state, busy);
  try {
    await action();
  } catch (error) {
    say(state, error.message, "bad");
  } finally {
    button.disabled = false;
  }
}

function say(element, text, kind = "quiet") {
  element.textContent = text;
  element.className = kind;
}

/** A SID as chips; the first `same` codes are filled. */
function sid(tokens, same = 0) {
  return make("span", { className: "codes" }, ...tokens.map((token, level) =>
    make("span", { className: level < same ? "same" : "" }, token.replace(/[<>]/g, ""))));
}

const common = (one, other) => {
  let length = 0;
  while (length < one.length && one[length] === other[length]) length += 1;
  return length;
};

function image(item, decorative) {
  const name = item.title || item.item_id;
  if (!item.picture) return make("span", { className: "picture", "aria-hidden": String(decorative) }, name.slice(0, 40));
  return make("img", { className: "picture", src: item.picture, alt: decorative ? "" : name, title: name, width: 72, height: 72 });
}

function card(item, tokens, ...details) {
  const same = tokens ? common(tokens, item.sid) : 0;
  return make("li", { "data-id": item.item_id }, image(item, true), make("div", {},
    make("div", { className: "name", dir: "auto" }, item.title || item.item_id), make("small", {}, item.item_id), sid(item.sid, same), ...details));
}

function showEncoded(found) {
  $("caption").textContent = found.caption ?? "none";
  $("interests").replaceChildren(...(found.interests.length ? found.interests.map((one) => make("span", { className: "interest" },
    one.descriptor, " ", make("small", {}, one.confidence.toFixed(2)))) : ["none"]));
  $("sid").replaceChildren(sid(found.sid, found.sid.length));
  $("notes").replaceChildren(...found.notes.map((note) => make("li", {}, note)));
  $("path").replaceChildren(...found.path.map((step, level) => {
    const prefix = sid(found.sid.slice(0, level + 1), level + 1);
    const pictures = make("ul", { className: "strip" }, ...step.examples.map((item) => make("li", {}, image(item, false))));
    const line = make("li", {}, make("div", { className: "head" }, prefix,
      make("span", { className: "quiet" }, step.items ? `${amount(step.items, "ad")} in this group` : "no ad has these codes yet")), pictures);
    line.style.setProperty("--level", String(level));
    return line;
  }));
  $("nearest").replaceChildren(...found.nearest.map((item) =>
    card(item, found.sid, make("small", {}, `similarity ${item.similarity.toFixed(3)}`))));
  $("append").hidden = !about?.appends;
  say($("append-state"), "");
  $("result").hidden = false;
  $("result").focus();
  drawExamples();
}

/** Fields of the ad, for a form. */
function fields() {
  const form = new FormData();
  if (picture) form.append("image", picture);
  for (const name of ["title", "description"]) if ($(name).value.trim()) form.append(name, $(name).value.trim());
  for (const name of $("categories").value.split(",")) if (name.trim()) form.append("categories", name.trim());
  return form;
}

$("ad").addEventListener("submit", (event) => {
  event.preventDefault();
  run($("ad"), $("ad-state"), "Reading the ad…", async () => {
    if (!picture && !$("title").value.trim() && !$("description").value.trim()) throw new Error("Drop a picture or type a title first.");
    const form = fields();
    form.append("pictures", "true");
    const [found] = (await ask("/encode", form)).results;
    if (found.status !== "ok") throw new Error(found.reason);
    form.delete("pictures");
    encoded = { form, found, content: await content(form) };
    say($("ad-state"), "");
    showEncoded(found);
  });
});

/** The ad of a form as an object, with its picture as a data URL. */
async function content(form) {
  const ad = {};
  for (const name of ["title", "description"]) if (form.has(name)) ad[name] = form.get(name);
  if (form.has("categories")) ad.categories = form.getAll("categories");
  if (form.has("image")) {
    ad.image = await new Promise((done, fail) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.onerror = () => fail(new Error("The picture cannot be read."));
      reader.readAsDataURL(form.get("image"));
    });
  }
  return ad;
}

$("append").addEventListener("submit", (event) => {
  event.preventDefault();
  run($("append"), $("append-state"), "Adding…", async () => {
    const form = new FormData();
    for (const [name, value] of encoded.form) form.append(name, value);
    form.append("item_id", $("new-id").value.trim());
    const [found] = (await ask("/items", form)).results;
    if (!found.sid) throw new Error(found.reason ?? found.status);
    const what = found.status === "added" ? "Added" : "It was there already";
    say($("append-state"), `${what}, with the codes ${found.sid.map((token) => token.replace(/[<>]/g, "")).join(" ")}.`, "good");
    await load();
  });
});

const THIS_AD = "(this-ad)"; // stands for the encoded ad in a typed history
const history = () => $("history").value.split(/[\s,]+/).filter(Boolean);

$("recommend").addEventListener("submit", (event) => {
  event.preventDefault();
  run($("recommend"), $("history-state"), "Looking…", async () => {
    const ids = history();
    if (ids.includes(THIS_AD) && !encoded) throw new Error("Encode an ad first.");
    const asked = ids.map((id) => (id === THIS_AD ? encoded.content : id));
    const [found] = (await ask("/recommend", { histories: [asked], k: 12, pictures: true })).results;
    const state = { personal: "", unknown_history: "None of these ids is known. ", empty_history: "Without a history: " }[found.status];
    const unknown = found.status === "personal" && found.unknown_ids ? `${amount(found.unknown_ids, "id")} not known. ` : "";
    say($("history-state"), `${state}${unknown}${found.status === "personal" ? "" : "Popular and new ads."}`);
    $("recommended").replaceChildren(...found.items.map((item) => card(item, null,
      make("small", { className: "why" }, `Because ${item.sources.map((name) => SOURCES[name] ?? name).join("; ")}.`))));
  });
});

/** Buttons that add known ads, and the encoded one, to the history. */
function drawExamples() {
  const add = (id) => () => {
    $("history").value = [...history(), id].join(" ");
  };
  const own = encoded ? [make("button", { type: "button", onclick: add(THIS_AD) }, "The ad above")] : [];
  $("examples").replaceChildren(...own, ...about.examples.slice(0, 8).map((item) =>
    make("button", { type: "button", onclick: add(item.item_id), title: item.item_id, dir: "auto" }, item.title || item.item_id)));
}

function choose(file) {
  picture = file ?? null;
  $("preview").hidden = !picture;
  if ($("preview").src) URL.revokeObjectURL($("preview").src);
  if (picture) $("preview").src = URL.createObjectURL(picture);
  else $("preview").removeAttribute("src");
  $("drop-text").hidden = Boolean(picture);
}

$("image").addEventListener("change", () => choose($("image").files[0]));
for (const name of ["dragenter", "dragover"]) $("drop").addEventListener(name, (event) => {
  event.preventDefault();
  $("drop").classList.add("over");
});
for (const name of ["dragleave", "drop"]) $("drop").addEventListener(name, () => $("drop").classList.remove("over"));
$("drop").addEventListener("drop", (event) => {
  event.preventDefault();
  const [file] = event.dataTransfer.files;
  if (file) choose(file);
});

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value;
  sessionStorage.setItem("mmsid-key", key);
  load();
});

async function load() {
  try {
    about = await ask("/about");
    $("key-form").hidden = true;
    const appended = about.appended ? `, ${amount(about.appended, "ad")} of them added here` : "";
    $("about").textContent = `${amount(about.items, "ad")}${appended}; ${about.num_levels} codes of ${about.codebook_size} per ad; ` +
      `bundle ${about.version}.`;
    $("history-section").hidden = !about.recommends;
    drawExamples();
  } catch (error) {
    say($("about"), error.message, "bad");
  }
}
load();
