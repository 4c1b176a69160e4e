"use strict";
/* Draws what the server sends. Names are hostile: they reach the page as text nodes only. */
(() => {
  const STATES = 7, KEEP = 300, KEY = "kvplug-key";
  const at = (id) => document.getElementById(id);
  const number = new Intl.NumberFormat("en");
  const round = (x) => x >= 100 ? number.format(Math.round(x)) : x >= 10 ? x.toFixed(1).replace(/\.0$/, "") : x > 0 ? x.toFixed(2).replace(/\.?0+$/, "") : "0";
  const share = (part, all) => all > 0 ? `${(100 * part / all).toFixed(part && part < all ? 1 : 0)}%` : "–";
  const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
  const bytes = (x) => { let i = 0; while (x >= 1024 && i < UNITS.length - 1) { x /= 1024; i++; } return `${i ? x.toFixed(1) : x} ${UNITS[i]}`; };
  const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
  const put = (element, text) => { if (element.textContent !== text) element.textContent = text; };
  const make = (tag, name, text) => {
    const found = document.createElement(tag);
    if (name) found.className = name;
    if (text !== undefined) found.textContent = text;
    return found;
  };

  let colours = [], ink = "", soft = "", line = "", palette = new Uint32Array(STATES);
  const readColours = () => {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    colours = Array.from({ length: STATES }, (_, i) => of(`--s${i}`));
    [ink, soft, line] = [of("--ink"), of("--soft"), of("--line")];
    palette = Uint32Array.from(colours, (hex) => {
      const value = parseInt(hex.slice(1), 16);
      return (255 << 24 | (value & 255) << 16 | (value >> 8 & 255) << 8 | value >> 16) >>> 0;
    });
  };

  /* -- the pool ------------------------------------------------------------------------------ */

  const RANK = [0, 1, 2, 4, 5, 6, 3];  // which state stands for several blocks in one pixel
  const map = at("map");
  let blocks = new Uint8Array(0), grid = { w: 1, h: 1, rows: 1, strip: 1, per: 1, scale: 1 }, cursor = -1, image = null;

  const inflate = async (packed) => {
    const raw = atob(packed), data = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) data[i] = raw.charCodeAt(i);
    const stream = new Blob([data]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  };

  /* Blocks lie in strips of STRIP columns, so that neighbours stay near each other. */
  const STRIP = 32, SIDES = [[3, 3], [3, 2], [2, 2], [2, 1], [1, 1]];
  const place = (i) => {
    const strip = Math.floor(i / (grid.strip * grid.rows)), within = i - strip * grid.strip * grid.rows;
    return [strip * grid.strip + within % grid.strip, Math.floor(within / grid.strip)];
  };
  const laidOut = (width, height, cells, scale) => {
    const fits = (w, h) => {
      const rows = Math.floor(height / h), columns = Math.floor(width / w);
      const strip = Math.min(STRIP, columns), wide = strip * Math.floor(columns / strip);
      // No more rows than needed, so that the strips take the whole width.
      return { w, h, rows: Math.min(rows, Math.ceil(cells / wide)), strip, fits: rows * wide >= cells };
    };
    for (let side = Math.floor(16 * scale); side > 3; side--) { const found = fits(side, side); if (found.fits) return found; }
    return SIDES.map(([w, h]) => fits(w, h)).find((found) => found.fits);
  };
  const drawMap = () => {
    const scale = Math.min(window.devicePixelRatio || 1, 2);
    const width = Math.max(STRIP, Math.floor(map.clientWidth * scale));
    const height = Math.max(1, Math.floor(map.clientHeight * scale));
    if (map.width !== width || map.height !== height || !image) {
      map.width = width; map.height = height;
      image = new ImageData(width, height);
    }
    const pixels = new Uint32Array(image.data.buffer), count = blocks.length, context = map.getContext("2d");
    pixels.fill(0);
    if (!count) { context.putImageData(image, 0, 0); return; }
    let per = Math.ceil(count / (width * height)), found;
    while (!(found = laidOut(width, height, Math.ceil(count / per), scale))) per++;
    const { w, h, rows, strip } = found, gap = w >= 5 ? Math.round(scale) : 0, cells = Math.ceil(count / per);
    grid = { w, h, rows, strip, per, scale };
    const across = w - gap, down = h - gap, area = strip * rows;
    for (let first = 0, left = 0; first < cells; first += area, left += strip * w) {
      for (let i = first, end = Math.min(cells, first + area), column = 0, line = left; i < end; i++) {
        let state = blocks[i * per];
        for (let j = i * per + 1, last = Math.min(count, (i + 1) * per); j < last; j++) if (RANK[blocks[j]] > RANK[state]) state = blocks[j];
        const colour = palette[state];
        for (let y = 0, from = line + column * w; y < down; y++, from += width) for (let x = 0; x < across; x++) pixels[from + x] = colour;
        if (++column === strip) { column = 0; line += h * width; }
      }
    }
    context.putImageData(image, 0, 0);
    if (cursor >= 0) {
      const [column, row] = place(Math.floor(cursor / per));
      context.strokeStyle = ink; context.lineWidth = Math.max(1, scale);
      context.strokeRect(column * w - 1, row * h - 1, Math.max(4, across) + 2, Math.max(4, down) + 2);
    }
  };

  const LABELS = Array.from(document.querySelectorAll("#legend li span:nth-child(2)"), (e) => e.textContent);
  const tellBlock = () => {
    if (cursor < 0 || cursor >= blocks.length) { put(at("block"), "Point at a block, or use the arrow keys."); return; }
    put(at("block"), `block ${number.format(cursor)}: ${LABELS[blocks[cursor]]}`);
  };
  const moveTo = (to) => { cursor = Math.max(0, Math.min(blocks.length - 1, to)); tellBlock(); drawMap(); };
  map.addEventListener("pointermove", (event) => {
    const box = map.getBoundingClientRect();
    const x = Math.floor((event.clientX - box.left) * grid.scale / grid.w), y = Math.floor((event.clientY - box.top) * grid.scale / grid.h);
    const found = ((Math.floor(x / grid.strip) * grid.rows + y) * grid.strip + x % grid.strip) * grid.per;
    if (y < grid.rows && found < blocks.length) moveTo(found);
  });
  map.addEventListener("pointerleave", () => { if (document.activeElement !== map) { cursor = -1; tellBlock(); drawMap(); } });
  map.addEventListener("blur", () => { cursor = -1; tellBlock(); drawMap(); });
  map.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -grid.per, ArrowRight: grid.per, ArrowUp: -grid.strip * grid.per, ArrowDown: grid.strip * grid.per, Home: -Infinity, End: Infinity }[event.key];
    if (step === undefined || !blocks.length) return;
    event.preventDefault();
    moveTo(cursor < 0 ? 0 : cursor + step);
  });

  /* -- charts -------------------------------------------------------------------------------- */

  const charts = {};
  const chart = (id, series, percent) => {
    const host = at(`chart-${id}`);
    const options = {
      width: Math.max(80, host.clientWidth), height: 124, pxAlign: 1, cursor: { y: false }, legend: { live: false },
      scales: { y: { range: (_, low, high) => percent ? [0, 100] : [0, Math.max(1, high * 1.1)] } },
      axes: [
        { stroke: () => soft, grid: { stroke: () => line, width: 1 }, ticks: { show: false }, size: 22, space: 70, values: (_, ticks) => ticks.map((t) => new Date(t * 1000).toLocaleTimeString("en", { hour12: false })) },
        { stroke: () => soft, grid: { stroke: () => line, width: 1 }, ticks: { show: false }, size: 46, values: (_, ticks) => ticks.map((t) => percent ? `${t}%` : t >= 10000 ? `${t / 1000}k` : `${t}`) },
      ],
      series: [{}, ...series.map(([label, colour]) => ({ label, stroke: () => colours[colour], width: 1.5, points: { show: false } }))],
    };
    charts[id] = new uPlot(options, [[], ...series.map(() => [])], host);
  };
  const makeCharts = () => {
    for (const one of Object.values(charts)) one.destroy();
    chart("tokens", [["computed", 2], ["generated", 4]], false);
    chart("load", [["running", 2], ["waiting", 3]], false);
    chart("fill", [["held", 2], ["cached", 1]], true);
  };
  const histories = new Map();
  const remember = (engine, before) => {
    let kept = histories.get(engine.engine);
    if (!kept) histories.set(engine.engine, kept = { at: [], tokens: [[], []], load: [[], []], fill: [[], []] });
    const seconds = before ? engine.clock - before.clock : 0;
    const rate = (name) => seconds > 0 && engine.totals[name] >= before.totals[name] ? (engine.totals[name] - before.totals[name]) / seconds : null;
    const rates = { computed: rate("scheduled"), generated: rate("generated") };
    const running = engine.requests.filter((r) => r.status === "running").length;
    const usable = Math.max(1, engine.blocks - engine.states[6]);
    const held = engine.states[2] + engine.states[3] + engine.states[4] + engine.states[5];
    const waiting = engine.requests.length - running + engine.more;
    const values = [kept.at, ...kept.tokens, ...kept.load, ...kept.fill];
    [engine.at, rates.computed, rates.generated, running, waiting, 100 * held / usable, 100 * engine.states[1] / usable].forEach((value, i) => {
      values[i].push(value);
      if (values[i].length > KEEP) values[i].shift();
    });
    return { rates, running, waiting, held, usable };
  };

  /* -- panels -------------------------------------------------------------------------------- */

  /* The width is read when it changes: reading it after each change of a row would lay out anew. */
  const rows = new Map();
  let spanWidth = 1, seenFrom = 0, seenTo = 30;
  const requestList = document.querySelector("#requests .scroll");
  requestList.addEventListener("scroll", () => {
    seenFrom = Math.floor(requestList.scrollTop / 25) - 20; seenTo = seenFrom + 60;
    if (latest) drawRequests(latest.engines.find((e) => e.engine === chosen) || latest.engines[0]);
  }, { passive: true });
  new ResizeObserver(([one]) => { spanWidth = Math.max(1, Math.floor(one.contentRect.width)); if (latest) render(latest); }).observe(document.querySelector("#requests th.span"));
  const drawSpan = (canvas, request) => {
    const mark = `${spanWidth} ${request.table} ${request.resident} ${request.approximate_from} ${request.status} ${colours[2]}`;
    if (canvas.dataset.mark === mark) return;
    canvas.dataset.mark = mark;
    const width = spanWidth, context = canvas.getContext("2d");
    canvas.width = width;
    const x = (block) => block / Math.max(1, request.table) * width;
    context.fillStyle = colours[0]; context.fillRect(0, 0, width, 12);
    context.fillStyle = request.status === "loading" ? colours[5] : request.held < request.table ? colours[3] : colours[2];
    for (const [first, end] of request.resident) context.fillRect(x(first), 0, Math.max(1, x(end) - x(first)), 12);
    if (request.approximate_from !== null && request.table && size) {
      context.fillStyle = colours[4];
      const from = request.approximate_from / size, top = request.held < request.table ? 8 : 0;
      for (const [first, end] of request.resident) if (end > from) context.fillRect(x(Math.max(first, from)), top, Math.max(1, x(end) - x(Math.max(first, from))), 12 - top);
    }
  };
  let size = 16;
  const drawRequests = (engine) => {
    size = engine.block_size;
    const body = at("request-rows"), seen = new Set();
    for (const [index, request] of engine.requests.entries()) {
      seen.add(request.id);
      let row = rows.get(request.id);
      if (!row) {
        row = make("tr");
        row.append(make("td"), make("td"), make("td", "n"), make("td", "n hit"), make("td", "span"));
        const canvas = make("canvas");
        canvas.height = 12; canvas.setAttribute("role", "img");
        row.lastChild.append(canvas);
        row.firstChild.textContent = request.id; row.firstChild.title = request.id;
        rows.set(request.id, row);
      }
      if (body.children[index] !== row) body.insertBefore(row, body.children[index] || null);
      // Rows out of sight are written when they come into it.
      if ((index < seenFrom || index > seenTo) && row.lastChild.firstChild.title) continue;
      const [, state, tokens, hit, span] = row.children;
      put(state, request.status);
      put(tokens, `${compact.format(request.computed)} / ${compact.format(request.prompt + request.output)}`);
      put(hit, compact.format(request.hit + request.loaded));
      const told = `${number.format(request.held)} of ${number.format(request.table)} blocks resident` + (request.approximate_from !== null ? `, approximate from token ${number.format(request.approximate_from)}` : "");
      if (span.firstChild.title !== told) { span.firstChild.title = told; span.firstChild.setAttribute("aria-label", told); }
      drawSpan(span.firstChild, request);
    }
    for (const [id, row] of rows) if (!seen.has(id)) { row.remove(); rows.delete(id); }
    put(at("requests-note"), engine.requests.length ? (engine.more ? `and ${number.format(engine.more)} more` : "computed / all tokens; what is resident of each one's text") : "none");
  };

  const policyRows = new Map();
  const drawPolicies = (engine) => {
    const host = at("policy-rows"), seen = new Set();
    for (const policy of engine.policies) {
      const id = `${policy.kind}\0${policy.name}`;
      seen.add(id);
      let row = policyRows.get(id);
      if (!row) {
        row = make("details", "policy");
        const summary = make("summary");
        summary.append(make("span", "kind", policy.kind), make("span", "name", policy.name), make("span", "tag"), make("span", "acted"));
        row.append(summary, make("div", "counters"));
        policyRows.set(id, row);
        host.append(row);
      }
      const [, name, tag, acted] = row.firstChild.children;
      name.title = policy.name;
      put(tag, policy.errors ? `failed ${number.format(policy.errors)}×` : policy.exact ? "exact" : "approximate");
      tag.classList.toggle("bad", policy.errors > 0);
      put(acted, policy.acted ? `acted ${number.format(policy.acted)}×` : "not acted yet");
      const table = row.lastChild, names = Object.keys(policy.counters);
      if (table.children.length !== 2 * names.length) {
        table.replaceChildren();
        for (const counter of names) table.append(make("span", "", counter), make("b"));
      }
      names.forEach((counter, i) => { put(table.children[2 * i], counter); put(table.children[2 * i + 1], round(policy.counters[counter])); });
    }
    for (const [id, row] of policyRows) if (!seen.has(id)) { row.remove(); policyRows.delete(id); }
    let note = engine.policies.length ? "" : "no policy; the engine runs as stock";
    if (engine.breakers) note = `breakers: ${engine.breakers.closed} closed, ${engine.breakers.half_open} half-open, ${engine.breakers.open} open`;
    put(at("policies-note"), note);
  };

  const drawHeat = (engine) => {
    const levels = [...new Map(engine.outcomes.map((o) => [`${o.level}\0${o.unit}`, o])).values()];
    const causes = [...new Set(engine.outcomes.map((o) => o.cause))];
    const counts = new Map(engine.outcomes.map((o) => [`${o.level}\0${o.unit}\0${o.cause}`, o.count]));
    const head = make("tr");
    head.append(make("th", "", "cause"));
    const sums = levels.map((l) => engine.outcomes.reduce((sum, o) => sum + (o.level === l.level && o.unit === l.unit ? o.count : 0), 0));
    for (const level of levels) { const cell = make("th", "n", level.level); cell.append(make("span", "", level.unit)); cell.title = `${level.level}, ${level.unit}`; cell.scope = "col"; head.append(cell); }
    const body = causes.map((cause) => {
      const row = make("tr"), name = make("th", "", cause);
      name.scope = "row"; name.title = cause;
      row.append(name);
      levels.forEach((level, i) => {
        const count = counts.get(`${level.level}\0${level.unit}\0${cause}`), cell = make("td", "", count === undefined ? "" : compact.format(count));
        if (count !== undefined) {
          cell.style.background = `rgb(var(--${cause === "hit" ? "heat" : "miss"}) / ${(0.08 + 0.5 * count / Math.max(1, sums[i])).toFixed(2)})`;
          cell.title = `${number.format(count)} ${level.unit}, ${share(count, sums[i])}`;
        }
        row.append(cell);
      });
      return row;
    });
    at("heat-head").replaceChildren(...(levels.length ? [head] : []));
    at("heat-rows").replaceChildren(...body);
    put(at("heat-note"), levels.length ? "since the start" : "nothing was looked up yet");
  };

  const drawLayers = (engine) => {
    const host = at("layer-cells");
    while (host.children.length > engine.layers.length) host.lastChild.remove();
    while (host.children.length < engine.layers.length) host.append(make("span"));
    let least = 1, table = 0;
    engine.layers.forEach((layer, i) => {
      const part = layer.table ? layer.held / layer.table : 0, cell = host.children[i];
      if (layer.table) least = Math.min(least, part);
      table = Math.max(table, layer.table);
      put(cell, layer.table ? `${Math.round(100 * part)}` : "–");
      cell.style.background = `rgb(var(--heat) / ${(layer.table ? 0.05 + 0.5 * part : 0).toFixed(2)})`;
      cell.title = `layer ${layer.layer}: ${number.format(layer.held)} of ${number.format(layer.table)} blocks, ${number.format(layer.token_bytes)} bytes a token`;
    });
    const total = engine.layers.reduce((sum, layer) => sum + layer.token_bytes, 0);
    put(at("layers-note"), `${table ? `% of the text's blocks; least ${Math.round(100 * least)}` : "nobody runs"} · ${number.format(total)} bytes a token`);
  };

  const tierRows = new Map();
  const drawTiers = (engine) => {
    const host = at("tier-rows"), seen = new Set();
    at("tiers").hidden = !engine.tiers.length;
    for (const tier of engine.tiers) {
      seen.add(tier.name);
      let row = tierRows.get(tier.name);
      if (!row) {
        row = make("div", "tier");
        const first = make("p", "line");
        first.append(make("span", "name", tier.name), make("span", "tag"), make("span", "used"));
        const bar = make("progress");
        bar.max = 1; bar.setAttribute("aria-label", `${tier.name}: share in use`);
        row.append(first, bar, make("p", "rate"));
        tierRows.set(tier.name, row);
        host.append(row);
      }
      const [first, bar, rate] = row.children;
      put(first.children[1], tier.down ? "down" : [tier.exact ? "exact" : "approximate", tier.shared && "shared", tier.durable && "durable"].filter(Boolean).join(", "));
      first.children[1].classList.toggle("bad", tier.down);
      put(first.children[2], tier.capacity ? `${bytes(tier.used)} of ${bytes(tier.capacity)}` : bytes(tier.used));
      bar.value = tier.capacity ? Math.min(1, tier.used / tier.capacity) : 0;
      put(rate, `${number.format(tier.chunks)} chunks · read ${tier.read ? `${bytes(tier.read)}/s` : "–"} · write ${tier.write ? `${bytes(tier.write)}/s` : "–"}`);
    }
    for (const [id, row] of tierRows) if (!seen.has(id)) { row.remove(); tierRows.delete(id); }
  };

  /* -- a state ------------------------------------------------------------------------------- */

  let chosen = 0, latest = null;
  const previous = new Map(), derived = new Map();
  const engineSelect = at("engine");
  engineSelect.addEventListener("change", () => { chosen = Number(engineSelect.value); rows.clear(); at("request-rows").replaceChildren(); if (latest) render(latest); });

  const problem = (text) => { at("problem").hidden = !text; put(at("problem"), text); };
  const status = (state, text) => { at("status").dataset.state = state; put(at("status"), text); };

  const render = async (state) => {
    const ranks = state.engines.map((e) => e.engine);
    if (engineSelect.options.length !== ranks.length || ranks.some((r, i) => Number(engineSelect.options[i].value) !== r)) {
      engineSelect.replaceChildren(...ranks.map((r) => { const option = make("option", "", `${r}`); option.value = `${r}`; return option; }));
    }
    at("engine-label").hidden = state.expected < 2;
    const engine = state.engines.find((e) => e.engine === chosen) || state.engines[0];
    problem(state.problem);
    if (!engine) { status("wait", "no engine"); return; }
    chosen = engine.engine; engineSelect.value = `${chosen}`;
    blocks = await inflate(engine.map);
    const { rates, running, waiting, held, usable } = derived.get(chosen);
    put(at("model"), engine.model);
    put(at("figure-running"), number.format(running));
    put(at("figure-waiting"), number.format(waiting));
    put(at("figure-computed"), rates.computed === null ? "–" : round(rates.computed));
    put(at("figure-generated"), rates.generated === null ? "–" : round(rates.generated));
    const prompts = engine.outcomes.filter((o) => o.level === "prefix cache" && o.unit === "tokens");
    put(at("figure-hit"), share(prompts.reduce((sum, o) => sum + (o.cause === "hit" ? o.count : 0), 0), prompts.reduce((sum, o) => sum + o.count, 0)));
    put(at("figure-held"), share(held, usable));
    engine.states.forEach((count, i) => put(at(`state-${i}`), number.format(count)));
    put(at("pool-note"), `${number.format(engine.blocks)} blocks of ${number.format(engine.block_size)} tokens, ${bytes(engine.block_bytes)} each`);
    put(at("versions"), `kvplug ${engine.kvplug} · vLLM ${engine.vllm} · step ${number.format(engine.totals.steps)} · ${number.format(engine.totals.finished)} requests ended, ${number.format(engine.totals.preemptions)} preemptions`);
    drawMap(); tellBlock();
    const kept = histories.get(chosen);
    for (const id of ["tokens", "load", "fill"]) charts[id].setData([kept.at, ...kept[id]]);
    drawRequests(engine); drawPolicies(engine); drawHeat(engine); drawLayers(engine); drawTiers(engine);
    status("live", "live");
  };

  const take = async (text) => {
    performance.clearMarks("kvplug-received");
    performance.mark("kvplug-received");
    const state = JSON.parse(text);
    for (const engine of state.engines) {
      derived.set(engine.engine, remember(engine, previous.get(engine.engine)));
      previous.set(engine.engine, engine);
    }
    latest = state;
    await render(state);
    performance.measure("kvplug-refresh", "kvplug-received");
  };

  /* -- the line to the server ---------------------------------------------------------------- */

  const keyForm = at("key-form");
  let wake = null;
  const askKey = (again) => {
    keyForm.hidden = false;
    put(at("key-problem"), again ? "The server does not take this key." : "");
    status("wait", "needs a key");
    if (document.activeElement === document.body) at("key").focus();
    return new Promise((resolve) => { wake = resolve; });
  };
  keyForm.addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, at("key").value);
    at("key").value = "";
    keyForm.hidden = true;
    if (wake) wake();
  });

  const watch = async () => {
    const key = sessionStorage.getItem(KEY);
    const answer = await fetch("kvplug/events", { headers: key ? { Authorization: `Bearer ${key}` } : {}, cache: "no-store" });
    if (answer.status === 401) { sessionStorage.removeItem(KEY); await askKey(key !== null); return 0; }
    if (!answer.ok) { problem((await answer.text()).slice(0, 1000)); status("lost", "not shown"); return 5000; }
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return 1000;
      rest += value;
      // Only the latest one counts: a page in the background must not fall behind.
      const events = rest.split("\n\n");
      rest = events.pop();
      const last = events.filter((e) => e.startsWith("data: ")).pop();
      if (last) await take(last.slice(6));
    }
  };
  const run = async () => {
    for (;;) {
      let pause = 2000;
      try { pause = await watch(); } catch (error) { status("lost", "no connection"); }
      if (pause) await new Promise((resolve) => setTimeout(resolve, pause));
    }
  };

  readColours();
  makeCharts();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); makeCharts(); if (latest) render(latest); });
  let resizing = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(resizing);
    resizing = requestAnimationFrame(() => {
      for (const [id, one] of Object.entries(charts)) one.setSize({ width: Math.max(80, at(`chart-${id}`).clientWidth), height: 124 });
      if (latest) render(latest);
    });
  });
  run();
})();
