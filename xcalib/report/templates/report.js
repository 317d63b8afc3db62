"use strict";
(() => {
  const $ = (id) => document.getElementById(id);
  const state = { point: 0, bin: 0, layer: 0, head: 0 };
  const views = new Map(); // chart to Vega view
  let heads, rows, specs, svgCells;

  const unpacked = async (id) => {
    const bytes = Uint8Array.from(atob($(id).textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };

  // Fractions in [0, 1] from unsigned integers, little-endian as they were packed.
  const fractions = (text, bits) => {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const top = 2 ** bits - 1;
    if (bits === 8) return Array.from(bytes, (v) => v / top);
    return Array.from({ length: bytes.length / 2 }, (_, i) => (bytes[2 * i] + 256 * bytes[2 * i + 1]) / top);
  };
  const errors = (text) => {
    const [low, high] = heads.errors, steps = 2 ** heads.bits - 1;
    return fractions(text, heads.bits).map((v) => (v > 0 ? low * (high / low) ** ((v * steps - 1) / (steps - 1)) : 0));
  };
  const expanded = (columns) => {
    const keys = Object.keys(columns);
    return keys.length ? columns[keys[0]].map((_, i) => Object.fromEntries(keys.map((k) => [k, columns[k][i]]))) : [];
  };

  const cellsAt = (() => {
    const known = new Map();
    return (point, bin) => {
      const key = `${point}/${bin}`;
      if (!known.has(key)) {
        const packed = heads.cells[point][bin];
        const tau = fractions(packed.tau, 16).map((v) => Math.round(v * 1e4) / 1e4);
        const density = packed.density && fractions(packed.density, heads.bits);
        const error = packed.error && errors(packed.error);
        const dense = new Set(heads.dense), gains = heads.gains[bin] || [];
        known.set(key, tau.map((value, i) => {
          const layer = Math.floor(i / heads.heads), one = error ? error[i] : null, gain = gains[layer];
          return {
            layer, head: i % heads.heads, tau: value, dense: dense.has(layer) || value >= 1,
            density: density ? density[i] : null, error: one, alone: one === null || gain == null ? null : one * gain,
          };
        }));
      }
      return known.get(key);
    };
  })();

  // One head's values of a packed (layers, heads, levels) table; only this head's are expanded.
  const curveOf = (which) => {
    const count = heads.levels.length, start = (state.layer * heads.heads + state.head) * count;
    const text = heads.curves[state.bin][which], width = heads.bits / 8;
    const from = Math.floor((start * width) / 3) * 4, skip = start * width - (from / 4) * 3;
    const part = atob(text.slice(from, from + 4 * Math.ceil((skip + count * width) / 3)));
    const values = btoa(part.slice(skip, skip + count * width));
    return which === "error" ? errors(values) : fractions(values, heads.bits);
  };

  const percent = (v) => (v === null ? "–" : `${(100 * v).toFixed(1)}\u202f%`);
  const small = (v) => {
    if (v === null || v === undefined) return "–";
    return v === 0 ? "0" : v < 1e-4 ? v.toExponential(2) : v.toPrecision(3);
  };

  // ---- charts
  const variable = /^var\(--([a-z0-9]+)\)$/;
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  // A canvas knows no CSS variables: they become parameters, which are set again when the theme changes.
  const withParameters = (spec) => {
    const used = new Set();
    const walk = (node) => {
      if (typeof node === "string" && variable.test(node)) {
        used.add(node.match(variable)[1]);
        return { expr: `theme_${node.match(variable)[1]}` };
      }
      if (Array.isArray(node)) return node.map(walk);
      return node && typeof node === "object" ? Object.fromEntries(Object.entries(node).map(([k, v]) => [k, walk(v)])) : node;
    };
    const walked = walk(spec);
    const themed = [...used].map((name) => ({ name: `theme_${name}`, value: colour(name) }));
    return { ...walked, params: [...(walked.params || []), ...themed] };
  };
  const repaint = () => {
    for (const view of views.values()) {
      const signals = Object.keys(view.getState().signals || {}).filter((name) => name.startsWith("theme_"));
      for (const name of signals) view.signal(name, colour(name.slice(6)));
      if (signals.length) view.run();
    }
  };
  // Rows of a tooltip; what a mark does not have, as an interval, is left out.
  const escaped = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
  const tooltipRows = (value) => {
    const shown = Object.entries(value).filter(([, said]) => said !== null && said !== "null");
    const row = ([key, said]) => `<tr><td class="key">${escaped(key)}</td><td class="value">${escaped(said)}</td></tr>`;
    return `<table><tbody>${shown.map(row).join("")}</tbody></table>`;
  };
  const draw = async (name, datasets, canvas = false) => {
    if (!specs[name] || !$(`chart-${name}`)) return null;
    let spec = { ...specs[name], datasets };
    if (canvas) spec = withParameters(spec);
    const made = await window.vegaEmbed($(`chart-${name}`), spec, {
      actions: false, renderer: canvas ? "canvas" : "svg", logLevel: 1, // empty layers are no news
      tooltip: { formatTooltip: tooltipRows },
      loader: { load: () => Promise.reject(new Error("nothing is loaded")) },
    });
    views.set(name, made.view);
    return made.view;
  };
  const update = (name, data) => {
    const view = views.get(name);
    if (!view) return;
    for (const [set, values] of Object.entries(data)) view.data(set, values);
    view.runAsync();
  };

  // ---- the chosen head
  const maps = ["tau", "density", "error"];
  const curveData = (which) => {
    const y = curveOf(which), spread = heads.curves[state.bin].spread;
    const marked = new Map(); // points of one tau share a mark
    heads.points.forEach((name, point) => {
      const cell = cellsAt(point, state.bin)[state.layer * heads.heads + state.head], known = marked.get(cell.tau);
      const names = known ? `${known.name}, ${name}` : name, shown = point === state.point || Boolean(known && known.shown);
      marked.set(cell.tau, { name: names, tau: cell.tau, y: cell[which], shown });
    });
    const chosen = [...marked.values()];
    return {
      curve: heads.levels.map((tau, i) => ({ tau, y: y[i] })),
      spread: heads.levels.map((tau, i) => ({ tau, low: spread.low[which][i], high: spread.high[which][i] })),
      chosen,
    };
  };
  const tell = () => {
    const cell = cellsAt(state.point, state.bin)[state.layer * heads.heads + state.head];
    const what = `Layer ${cell.layer}, head ${cell.head} at ${heads.points[state.point]}: tau ${cell.tau}`;
    const kept = cell.density === null ? "" : ` keeps ${percent(cell.density)} of the blocks, output error ${small(cell.error)}`;
    const alone = cell.alone === null ? "" : `, KL alone ${small(cell.alone)} nats per token`;
    $("chosen").textContent = cell.dense ? `${what}, which runs dense.` : `${what}${kept}${alone}.`;
  };
  const fill = (id, lines) => {
    const body = $(id) && $(id).tBodies[0];
    if (!body) return;
    body.replaceChildren(...lines.map((cells) => {
      const row = document.createElement("tr");
      for (const text of cells) row.appendChild(document.createElement("td")).textContent = text;
      return row;
    }));
  };
  const showHead = () => {
    $("layer").value = state.layer;
    $("head").value = state.head;
    for (const name of maps) {
      const view = views.get(name);
      if (view) view.signal("layer", state.layer).signal("head", state.head).runAsync();
    }
    tell();
    if (!heads.curves.length) return;
    const data = { density: curveData("density"), error: curveData("error") };
    update("curve-density", data.density);
    update("curve-error", data.error);
    const gain = (heads.gains[state.bin] || [])[state.layer];
    fill("table-curve", heads.levels.map((tau, i) => {
      const error = data.error.curve[i].y;
      return [tau, percent(data.density.curve[i].y), small(error), gain == null ? "–" : small(gain * error)];
    }));
  };
  const showPoint = () => {
    const cells = cellsAt(state.point, state.bin);
    for (const name of maps) update(name, { heads: cells });
    fill("table-layers", Array.from({ length: heads.layers }, (_, layer) => {
      const row = cells.slice(layer * heads.heads, (layer + 1) * heads.heads);
      const taus = row.map((c) => c.tau).sort((a, b) => a - b), middle = (taus.length - 1) / 2;
      const median = (taus[Math.floor(middle)] + taus[Math.ceil(middle)]) / 2;
      const sum = (key) => (row[0][key] === null ? null : row.reduce((total, c) => total + c[key], 0));
      const density = sum("density");
      const name = heads.dense.includes(layer) ? `${layer} (dense)` : layer;
      const ends = [taus[0], median, taus[taus.length - 1]].map((v) => v.toFixed(4));
      return [name, ...ends, percent(density === null ? null : density / row.length), small(sum("error"))];
    }));
    showHead();
  };
  const choose = (layer, head) => {
    state.layer = Math.min(Math.max(layer, 0), heads.layers - 1);
    state.head = Math.min(Math.max(head, 0), heads.heads - 1);
    showHead();
  };
  const MOVES = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  const listen = () => {
    for (const key of ["point", "bin"]) {
      $(key).addEventListener("change", () => { state[key] = Number($(key).value); showPoint(); });
    }
    for (const key of ["layer", "head"]) {
      $(key).addEventListener("change", () => choose(Number($("layer").value), Number($("head").value)));
    }
    $("controls").addEventListener("submit", (event) => event.preventDefault());
    for (const name of maps) {
      const view = views.get(name);
      if (!view) continue;
      view.addEventListener("click", (_event, item) => {
        if (item && item.datum && item.datum.layer !== undefined) choose(item.datum.layer, item.datum.head);
      });
      $(`chart-${name}`).addEventListener("keydown", (event) => {
        const move = MOVES[event.key];
        if (!move || event.altKey || event.ctrlKey || event.metaKey) return;
        event.preventDefault();
        choose(state.layer + move[0], state.head + move[1]);
      });
    }
    $("controls").hidden = false;
  };

  // ---- themes and print
  const themes = ["system", "light", "dark"];
  const setTheme = (name) => {
    if (name === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    $("theme").querySelector("span").textContent = name;
    repaint();
  };
  const watchTheme = () => {
    let chosen = 0;
    $("theme").hidden = false;
    $("theme").addEventListener("click", () => { chosen = (chosen + 1) % themes.length; setTheme(themes[chosen]); });
    for (const query of ["(prefers-color-scheme: dark)", "print"]) {
      window.matchMedia(query).addEventListener("change", repaint);
    }
    let opened = [];
    window.addEventListener("beforeprint", () => {
      opened = [...document.querySelectorAll("details:not([open])")];
      for (const part of opened) part.open = true;
    });
    window.addEventListener("afterprint", () => { for (const part of opened) part.open = false; });
  };

  const start = async () => {
    watchTheme();
    const [code, text] = await Promise.all([unpacked("vega"), unpacked("data")]);
    const script = document.createElement("script");
    script.textContent = `(() => {${code}\n})();`;
    document.head.appendChild(script).remove();
    const data = JSON.parse(text);
    ({ heads, specs, cells: svgCells } = data);
    rows = Object.fromEntries(Object.entries(data.rows).map(([name, columns]) => [name, expanded(columns)]));
    [state.point, state.bin] = heads.shown;
    const canvas = heads.layers * heads.heads > svgCells;
    const cells = cellsAt(state.point, state.bin);
    await draw("front", { lines: rows.lines, marks: rows.marks });
    await draw("held", { held: rows.held });
    for (const name of maps) await draw(name, { heads: cells }, canvas);
    if (heads.curves.length) for (const name of ["density", "error"]) await draw(`curve-${name}`, curveData(name));
    for (const name of ["density", "kl"]) await draw(`length-${name}`, { lengths: rows.lengths });
    listen();
    const first = cells.find((cell) => !cell.dense) || cells[0];
    Object.assign(state, { layer: first.layer, head: first.head });
    showPoint();
    document.documentElement.dataset.ready = "1";
  };
  start().catch((error) => { $("no-charts").hidden = false; console.error(error); });
})();
