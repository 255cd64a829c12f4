"use strict";
// Draws each figure when it comes into view, and all of them where the address ends in #all.
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
let theme = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
const drawn = new Set();
const whole = location.hash === "#all";

function draw(place) {
  const figure = data.figures[Number(place.dataset.figure)];
  const layout = Object.assign({}, figure.layout, {
    template: data.templates[theme],
    autosize: true,
  });
  const narrow = place.clientWidth < 400;
  // What the second line of titles says is below the figure, in full.
  const told = layout.title.subtitle?.text;
  const above = layout.margin.t - (told ? 15 * told.split("<br>").length : 0);
  const size = Math.max(9, Math.min(15, Math.floor((1.75 * place.clientWidth) / (layout.title.text || " ").length)));
  layout.title = Object.assign({}, layout.title, { subtitle: { text: "" }, xref: "container", x: 0, pad: { l: 10 }, font: { size } });
  layout.margin = { l: narrow ? 4 : 12, r: narrow ? 4 : 12, b: 12, t: above - (layout.showlegend ? 0 : 16) };
  drawn.add(place);
  return Plotly.react(place, figure.data, layout, {
    responsive: true,
    displaylogo: false,
    displayModeBar: narrow || whole ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: { format: "svg", filename: figure.name.replace(/[^\w-]+/g, "_") },
  });
}

function paint() {
  root.dataset.theme = theme;
  document.getElementById("theme").textContent = theme === "dark" ? "light" : "dark";
  drawn.forEach(draw);
}

const places = [...document.querySelectorAll("[data-figure]")];
const seen = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      seen.unobserve(entry.target);
      draw(entry.target);
    }
  },
  { rootMargin: "300px" },
);
paint();
if (whole) {
  theme = "light";
  paint();
  Promise.all(places.map(draw)).then(() => {
    root.dataset.height = String(root.scrollHeight);
  });
} else {
  places.forEach((place) => seen.observe(place));
}
document.getElementById("theme").addEventListener("click", () => {
  theme = theme === "dark" ? "light" : "dark";
  paint();
});
