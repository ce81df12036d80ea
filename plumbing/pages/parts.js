// What both pages use: nodes, pieces of a question, and charts as inline SVG.
// TRAP: everything from the data goes through textContent, an attribute of a shape, or a number in
// a style. None of it is ever read as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
document.title = document.querySelector("h1").textContent = data.title;

function make(tag, parent, text, kind) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  if (kind) node.className = kind;
  return parent.appendChild(node);
}

// ------------------------------------------------------------------------ pieces of a question
function verdict(parent, isCorrect) {
  const [text, kind] = isCorrect ? ["✓ right", "right"] : ["✗ wrong", "wrong"];
  return make("span", parent, text, `verdict ${kind}`);
}

function pictures(parent, question) {
  for (const image of question.images) {
    const frame = make("div", parent, undefined, "picture");
    frame.style.width = `${image.width}px`;
    const picture = make("img", frame);
    picture.src = image.src;
    picture.alt = `picture of question ${question.id}`;
    for (const [left, top, right, bottom] of image.boxes) {
      Object.assign(make("i", frame).style, {
        left: `${100 * left}%`,
        top: `${100 * top}%`,
        width: `${100 * (right - left)}%`,
        height: `${100 * (bottom - top)}%`,
      });
    }
  }
}

function hintList(parent, hint) {
  make("h3", parent, "The hint, which only the teacher reads");
  const list = make("dl", parent);
  for (const [name, phrases] of Object.entries(hint)) {
    if (!phrases.length) continue;
    make("dt", list, name);
    make("dd", list, phrases.join("; "));
  }
}

// --------------------------------------------------------------------------------------- charts
// the page holds no address, not even that of SVG: its own svg knows it
const NAMESPACE = document.getElementById("patterns").namespaceURI;

function draw(tag, parent, attributes = {}, text) {
  const node = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
}

// A figure whose svg is painted for its present width: text keeps its size on a narrow screen.
function chart(parent, title, height, paint) {
  const figure = make("figure", parent);
  make("figcaption", figure, title);
  const svg = draw("svg", figure, {role: "img", "aria-label": title, height});
  let width = 0;
  new ResizeObserver(([entry]) => {
    const present = Math.floor(entry.contentRect.width);
    if (present === width || !present) return;
    width = present;
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren();
    paint(svg, width);
  }).observe(figure);
  return figure;
}

const fixed = (value, digits) => value.toFixed(digits).replace(/^-(0\.?0*)$/, "$1");
const percent = (share, digits = 1) => `${fixed(100 * share, digits)} %`;

// From an interval of numbers to one of pixels.
function scale([low, high], [from, to]) {
  return value => from + (value - low) / (high - low || 1) * (to - from);
}

// Round numbers from low to high, at most `count` steps apart.
function ticks(low, high, count = 5) {
  const rough = (high - low) / count || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough * 0.999);
  const list = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-6; i++) list.push(i * step);
  return list;
}

// The axes of a chart. box: {left, right, top, bottom} in pixels; ticks are [pixel, text].
function axes(svg, box, xTicks, yTicks, xName) {
  for (const [y, text] of yTicks) {
    draw("line", svg, {class: "rule", x1: box.left, x2: box.right, y1: y, y2: y});
    draw("text", svg, {class: "soft", x: box.left - 6, y: y + 4, "text-anchor": "end"}, text);
  }
  for (const [x, text] of xTicks) {
    draw("line", svg, {class: "rule", x1: x, x2: x, y1: box.bottom, y2: box.bottom + 4});
    const place = {class: "soft", x, y: box.bottom + 17, "text-anchor": "middle"};
    draw("text", svg, place, text);
  }
  const middle = (box.left + box.right) / 2;
  const below = {class: "soft", x: middle, y: box.bottom + 33, "text-anchor": "middle"};
  draw("text", svg, below, xName);
}

const SHAPES = [
  "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
  "M-4 -4h8v8h-8z",
  "M0 -5l5 9h-10z",
  "M0 -5.5l5 5.5l-5 5.5l-5 -5.5z",
  "M0 5l5 -9h-10z",
  "M-4 -4l8 8m0 -8l-8 8",
];

function mark(svg, kind, shape, x, y) {
  const place = {class: `mark ${kind}`, d: SHAPES[shape], transform: `translate(${x} ${y})`};
  draw("path", svg, place);
}

// Curves over x. series: {kind, shape (undefined: no marks), isJoined, points: [[x, y]]}.
// x: {name, ticks, of (maps x before it is drawn)}; y: {low, high, text (of a tick)}.
function curveChart(parent, title, series, x, y, height = 210) {
  return chart(parent, title, height, (svg, width) => {
    const box = {left: 46, right: width - 12, top: 10, bottom: height - 40};
    const all = series.flatMap(({points}) => points.map(([at]) => x.of(at)));
    const toX = scale([Math.min(...all), Math.max(...all)], [box.left + 6, box.right - 6]);
    const toY = scale([y.low, y.high], [box.bottom, box.top]);
    const yTicks = ticks(y.low, y.high).map(at => [toY(at), y.text(at)]);
    axes(svg, box, x.ticks.map(at => [toX(x.of(at)), `${at}`]), yTicks, x.name);
    for (const {kind, shape, isJoined, points} of series) {
      const places = points.map(([at, value]) => [toX(x.of(at)), toY(value)]);
      if (isJoined) draw("polyline", svg, {class: `curve ${kind}`, points: places.join(" ")});
      if (shape === undefined) continue;
      for (const [left, top] of places) mark(svg, kind, shape, left, top);
    }
  });
}

// Areas upon each other, whose shares sum to 1 at each x. series: {kind, isHatched, points}.
function areaChart(parent, title, series, x) {
  const height = 210;
  return chart(parent, title, height, (svg, width) => {
    const box = {left: 46, right: width - 12, top: 10, bottom: height - 40};
    const xs = series[0].points.map(([at]) => at);
    const toX = scale([xs[0], xs.at(-1)], [box.left, box.right]);
    const toY = scale([0, 1], [box.bottom, box.top]);
    let floor = xs.map(() => 0);
    for (const {kind, isHatched, points} of series) {
      const ceiling = points.map(([, share], i) => floor[i] + share);
      const above = xs.map((at, i) => [toX(at), toY(ceiling[i])]);
      const below = xs.map((at, i) => [toX(at), toY(floor[i])]).reverse();
      const outline = [...above, ...below].join(" ");
      draw("polygon", svg, {class: `area ${kind}`, points: outline});
      if (isHatched) draw("polygon", svg, {fill: "url(#hatch)", points: outline});
      floor = ceiling;
    }
    const yTicks = [0, 0.5, 1].map(at => [toY(at), percent(at, 0)]);
    axes(svg, box, x.ticks.map(at => [toX(at), `${at}`]), yTicks, x.name);
  });
}

// Lying bars from 0, with standard errors. rows: {name, kind, value, error, text}; value may be
// null: then there is the text alone.
function barChart(parent, title, rows) {
  const step = 38;
  return chart(parent, title, rows.length * step + 6, (svg, width) => {
    const known = rows.filter(row => row.value !== null);
    const low = Math.min(0, ...known.map(({value, error}) => value - error));
    const high = Math.max(...known.map(({value, error}) => value + error), low + 1e-9);
    const toX = scale([low, high], [2, width - 2]);
    rows.forEach(({name, kind, value, error, text}, i) => {
      const top = i * step + 6, middle = top + 25;
      draw("text", svg, {x: 0, y: top + 13}, name);
      draw("text", svg, {x: width, y: top + 13, "text-anchor": "end"}, text);
      if (value === null) return;
      const [left, right] = [toX(0), toX(value)].sort((a, b) => a - b);
      const bar = {x: left, y: middle - 6, width: right - left, height: 12};
      draw("rect", svg, {class: `area ${kind}`, ...bar});
      const [start, end] = [toX(value - error), toX(value + error)];
      const whisker = `M${start} ${middle}H${end}M${start} ${middle - 4}v8M${end} ${middle - 4}v8`;
      draw("path", svg, {class: "whisker", d: whisker});
      draw("path", svg, {class: "outline", d: `M${toX(0)} ${middle - 9}v18`});
    });
  });
}

// Bars whose parts stand side by side, each over the whole width. rows: {name, text, parts};
// parts: {kind, value, text, isHatched}; a part's text is left out where it does not fit.
function stackChart(parent, title, rows) {
  const step = 50;
  return chart(parent, title, rows.length * step, (svg, width) => {
    rows.forEach(({name, text, parts}, i) => {
      const top = i * step, whole = parts.reduce((sum, {value}) => sum + value, 0);
      draw("text", svg, {x: 0, y: top + 13}, name);
      draw("text", svg, {x: width, y: top + 13, "text-anchor": "end"}, text);
      let left = 0;
      for (const part of parts) {
        const wide = whole ? part.value / whole * width : 0;
        if (!wide) continue;
        const bar = {x: left, y: top + 19, width: wide, height: 24};
        draw("rect", svg, {class: `area ${part.kind}`, ...bar});
        if (part.isHatched) draw("rect", svg, {fill: "url(#hatch)", ...bar});
        draw("rect", svg, {class: "outline", ...bar});
        const place = {class: "halo", x: left + wide / 2, y: top + 36, "text-anchor": "middle"};
        if (part.text.length * 8 + 6 < wide) draw("text", svg, place, part.text);
        left += wide;
      }
    });
  });
}

// One line of a legend's svg: a curve with its mark, or a patch of an area.
function sample(parent, {kind, shape, isJoined, isHatched}) {
  const svg = draw("svg", parent, {viewBox: "0 0 38 14", "aria-hidden": "true"});
  if (isJoined) draw("line", svg, {class: `curve ${kind}`, x1: 0, x2: 38, y1: 7, y2: 7});
  if (shape !== undefined) mark(svg, kind, shape, 19, 7);
  if (isJoined || shape !== undefined) return;
  const patch = {x: 1, y: 1, width: 36, height: 12};
  draw("rect", svg, {class: `area ${kind}`, ...patch});
  if (isHatched) draw("rect", svg, {fill: "url(#hatch)", ...patch});
  draw("rect", svg, {class: "outline", ...patch});
}

function legend(parent, entries) {
  const list = make("ul", parent, undefined, "legend");
  for (const entry of entries) {
    const line = make("li", list);
    sample(line, entry);
    make("span", line, entry.name);
  }
}
