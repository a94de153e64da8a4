// plotly.js comes packed, once for a page, before the first figure needs it.
// Unpacking is not waited for: a widget has two seconds to start.
const key = Symbol.for("smoothkit.plotly");

async function unpack(packed) {
  const text = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const code = `const module = {exports: {}}, define = undefined;\n${text}\nexport default module.exports;`;
  const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  const found = await import(url);
  URL.revokeObjectURL(url);
  return found.default;
}

export default {
  initialize({ model }) {
    globalThis[key] ??= unpack(model.get("packed"));
  },
};
