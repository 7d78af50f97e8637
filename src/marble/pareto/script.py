"""What moves on the page: the choice of rewards, and which points' details are shown. Nothing of a user's is in it."""

STYLE = """
#pareto{display:grid;grid-template-columns:minmax(0,560px) minmax(300px,1fr);gap:10px 22px}
#choice{grid-column:1/-1;display:flex;gap:16px;flex-wrap:wrap;font-size:14px}
#plot{width:100%} #plot text{font-size:11px;fill:#555} #plot .name{font-size:13px;fill:#222;font-weight:600}
.axis path{stroke:#e8e8ee;fill:none} .edge{stroke:#888;fill:none}
#front{stroke:#222;stroke-width:1.4;fill:none;stroke-dasharray:5 3}
.cross{stroke:var(--c);stroke-opacity:.3;fill:none}
circle{fill:var(--c);stroke:var(--rim,#fff);stroke-width:1.2;cursor:pointer;outline:none}
circle.checkpoint{fill-opacity:.45} circle.scale,circle.soup{fill:var(--rim,#fff);stroke:var(--c);stroke-width:2.2}
circle.soup{stroke-dasharray:3 2} circle.d{opacity:.5} circle.n{opacity:.75}
circle:hover,circle:focus,circle.shown{stroke:#111;stroke-width:3;opacity:1;stroke-dasharray:none}
#about article{border:1px solid #e4e4ea;border-left:5px solid var(--c);border-radius:6px;padding:8px 12px}
#about article{margin:0 0 10px}
#about h3{font-size:15px;margin:0} #about p{font-size:13px}
#about .pictures{display:grid;grid-template-columns:repeat(6,1fr);gap:4px;margin-top:6px}
#about img{width:100%;aspect-ratio:1;object-fit:cover;border-radius:3px;image-rendering:pixelated}
#about table{font-size:12.5px} #about td,#about th{padding:1px 9px 1px 0;white-space:nowrap}
.key{display:inline-block;margin-right:14px;font-size:13px} .key svg{vertical-align:-2px}
.wide{overflow-x:auto} .wide td{white-space:nowrap;font-size:13px}
.wide td:last-child{white-space:normal;min-width:11em}
@media(max-width:760px){#pareto{grid-template-columns:1fr}}
"""

SCRIPT = """
"use strict";
const plot = document.getElementById("plot"), hint = document.getElementById("hint");
const invitation = hint.textContent;
const [left, top_, width, height] = plot.dataset.box.split(" ").map(Number), count = Number(plot.dataset.rewards);
const circles = [...plot.querySelectorAll("circle")], crosses = [...plot.querySelectorAll(".cross")];
const articles = [...document.querySelectorAll("#about article")];
const [across, up, size] = ["across", "up", "size"].map(id => document.getElementById(id));
const shares = circles.map(circle => Object.fromEntries(
  ["at", "low", "high"].map(key => [key, circle.dataset[key].split(" ").map(Number)])));
let pinned = [], pointed = null;

function place() {
  const x = Number(across.value), y = Number(up.value), third = Number(size.value), front = [];
  const px = share => (left + share * width).toFixed(1), py = share => (top_ + (1 - share) * height).toFixed(1);
  for (const axis of plot.querySelectorAll(".axis"))
    axis.style.display = [`x${x}`, `y${y}`].includes(axis.dataset.axis) ? "inline" : "none";
  circles.forEach((circle, i) => {
    const {at, low, high} = shares[i], state = circle.dataset.states[x * count + y];
    for (const element of [circle, crosses[i]]) element.style.display = state === "-" ? "none" : "inline";
    circle.setAttribute("cx", px(at[x]));
    circle.setAttribute("cy", py(at[y]));
    circle.setAttribute("r", third < 0 ? 6 : 3 + 9 * at[third]);
    for (const letter of "fdn") circle.classList.toggle(letter, state === letter);
    const level = `M${px(low[x])} ${py(at[y])}H${px(high[x])}`, upright = `M${px(at[x])} ${py(low[y])}V${py(high[y])}`;
    crosses[i].setAttribute("d", level + upright);
    if (state === "f") front.push(at);
  });
  front.sort((a, b) => a[x] - b[x]);
  const steps = front.map((at, i) => `${i ? "V" : `M${left} `}${py(at[y])}H${px(at[x])}`);
  document.getElementById("front").setAttribute("d", steps.length ? `${steps.join("")}V${top_ + height}` : "");
}

function show() {
  const shown = pointed === null || pinned.includes(pointed) ? pinned : [...pinned.slice(0, 1), pointed];
  articles.forEach((article, i) => {
    article.hidden = !shown.includes(i);
    article.style.order = shown.indexOf(i);
    circles[i].classList.toggle("shown", shown.includes(i));
    circles[i].setAttribute("aria-pressed", pinned.includes(i));
  });
  const told = shown.map(i => articles[i].querySelector("h3").textContent).join(" and ") || invitation;
  if (hint.textContent !== told) hint.textContent = told;
}

function readAddress() {
  const found = location.hash.match(/^#point-([0-9]+)(?:,([0-9]+))?$/) || [];
  pinned = [...new Set(found.slice(1).filter(Boolean).map(Number))].filter(i => i < circles.length);
  show();
}

function toggle(i) {
  const next = pinned.includes(i) ? pinned.filter(other => other !== i) : [...pinned, i].slice(-2);
  location.hash = next.length ? `point-${next.join(",")}` : "none";
}

circles.forEach((circle, i) => {
  const point = index => () => { pointed = index; show(); };
  for (const event of ["mouseenter", "focus"]) circle.addEventListener(event, point(i));
  for (const event of ["mouseleave", "blur"]) circle.addEventListener(event, point(null));
  circle.addEventListener("click", () => toggle(i));
  circle.addEventListener("keydown", event => {
    if (event.key !== "Enter" && event.key !== " ") return;
    event.preventDefault();
    toggle(i);
  });
});
for (const choice of [across, up, size]) choice.addEventListener("change", place);
window.addEventListener("hashchange", () => {
  readAddress();
  if (pinned.length) document.getElementById("about").scrollIntoView({block: "nearest"});
});
document.getElementById("choice").hidden = false;
place();
readAddress();
"""
