// a figure is drawn when it comes near the window: fifty at once would keep the page busy for long
const seen = new IntersectionObserver(entries => entries.forEach(entry => {
  const div = entry.target;
  if (!entry.isIntersecting || div.dataset.drawn) return;
  div.dataset.drawn = "yes";
  const figure = JSON.parse(document.getElementById("data-" + div.id).textContent);
  Plotly.newPlot(div, {data: figure.data, layout: figure.layout, frames: figure.frames, config: config});
}), {rootMargin: "600px"});
document.querySelectorAll(".plotly").forEach(div => seen.observe(div));
