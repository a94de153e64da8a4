const key = Symbol.for("smoothkit.plotly");

async function library() {
  for (let i = 0; !globalThis[key]; i++) {
    if (i > 1200) throw new Error("plotly.js has not come from the kernel; run the cell again");
    await new Promise(resolve => setTimeout(resolve, 50));
  }
  return globalThis[key];
}

export default {
  async render({ model, el }) {
    const plotly = await library();
    const box = document.createElement("div");
    box.className = "smoothkit-figure";
    box.setAttribute("role", "img");
    el.appendChild(box);

    let drawing = false, again = false, listening = false, gone = false;
    async function draw() {
      if (drawing) { again = true; return; }
      drawing = true;
      do {
        again = false;
        const { data, layout } = structuredClone(model.get("content"));
        box.setAttribute("aria-label", layout?.title?.text ?? "figure");
        await plotly.react(box, data ?? [], layout ?? {}, model.get("config"));
        box.dataset.drawn = model.get("drawn");
        if (!listening) { listen(); listening = true; }
      } while (again && !gone);
      drawing = false;
    }

    let events = 0;
    function tell(name, what) {
      model.set(name, { ...what, event: ++events + Date.now() });
      model.save_changes();
    }
    function listen() {
      box.on("plotly_click", ({ points }) => {
        const p = points[0], i = p.pointNumber ?? null;
        tell("clicked", { trace: p.curveNumber, point: i, x: p.x ?? null, y: p.y ?? null });
      });
      box.on("plotly_selected", found => {
        if (found?.range) tell("selected", { x: found.range.x ?? null, y: found.range.y ?? null });
      });
      box.on("plotly_deselect", () => tell("selected", {}));
    }

    model.on("change:drawn", draw);
    const watch = new ResizeObserver(() => { if (box.offsetParent && listening) plotly.Plots.resize(box); });
    watch.observe(el);
    await draw();
    return () => { gone = true; watch.disconnect(); model.off("change:drawn", draw); plotly.purge(box); };
  },
};
