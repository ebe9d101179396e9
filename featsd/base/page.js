"use strict"; {
const dark = matchMedia("(prefers-color-scheme: dark)"), all = (root, what) => [...root.querySelectorAll(what)]
const make = (tag, has = {}, ...inside) => { const n = Object.assign(document.createElement(tag), has); n.append(...inside); return n }
const PALE = { "#000000": "#f2f2f2", "#444444": "#bdbdbd" }
let paper = false

// figures: drawn from the numbers that lie beside them, in the page's colours and for its width
const look = light => {
    const grid = light ? "#e3e7ec" : "#2f3843", line = light ? "#57606a" : "#9fabb8"
    const axis = { automargin: true, gridcolor: grid, zerolinecolor: grid, linecolor: line, title: { standoff: 10 } }
    return { layout: { xaxis: axis, yaxis: axis, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
                       font: { color: light ? "#1b1f24" : "#e6edf3", size: 12 }, hovermode: "closest" } }
}
const broken = text => text.length < 20 ? text : text.replace(/^(.{8,22}?)[ -](?=.{4})/, "$1<br>") // a long label in two lines
const small = box => !paper && box.clientWidth < 560

function draw(box) {
    const place = box.querySelector(".drawn"), light = paper || !dark.matches, narrow = small(box)
    const kept = box.querySelector("script").textContent
    const f = JSON.parse(light ? kept : kept.replace(/#(000000|444444)/g, c => PALE[c]))
    const at = place.layout?.sliders?.[0].active, layout = narrow ? f.narrow : f.wide
    f.data.forEach((t, i) => {
        for (const e of ["error_x", "error_y"]) if (t[e]) t[e].color = light ? "#444" : "#d0d7de"
        if (narrow && f.domains[i]) t.domain = f.domains[i]
        if (narrow && t.orientation === "h") t.y = t.y.map(broken)
    })
    const rows = [...new Set(f.data.flatMap(t => t.orientation === "h" ? t.y : []))]
    if (narrow && rows.some(y => `${y}`.includes("<br>"))) layout.height += 12 * rows.length // two lines each
    layout.template = look(light)
    if (paper) Object.assign(layout, { autosize: false, width: 660 })
    box.narrow = narrow
    place.style.height = layout.height + "px"
    Plotly.react(place, f.data, layout, { displaylogo: false, responsive: !paper, displayModeBar: paper ? false : "hover" })
    keys(box, place)
    const slider = place.layout.sliders?.[0]
    if (!slider) return
    if (at !== undefined && at !== slider.active) move(place, at)
    if (!place.moves) {
        place.moves = true
        place.on("plotly_sliderchange", e => say(box, e.slider.active))
        place.tabIndex = 0
        place.setAttribute("role", "slider")
        place.addEventListener("keydown", e => {
            const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[e.key]
            if (by) { e.preventDefault(); move(place, place.layout.sliders[0].active + by) }
        })
    }
    say(box, place.layout.sliders[0].active)
}

function move(place, to) { // the slider's own step, by key
    const s = place.layout.sliders[0], step = s.steps[to]
    if (!step) return
    s.active = to
    Plotly.update(place, ...step.args).then(() => Plotly.relayout(place, { "sliders[0].active": to }))
    say(place.closest("figure"), to)
}

function say(box, at) {
    const place = box.querySelector(".drawn"), s = place.layout.sliders[0], text = place.layout.meta.said[at]
    box.querySelector(".said").textContent = text
    const aria = { valuemin: 0, valuemax: s.steps.length - 1, valuenow: at, valuetext: text, label: s.currentvalue.prefix }
    for (const [k, v] of Object.entries(aria)) place.setAttribute("aria-" + k, v)
}

function keys(box, place) { // a legend that never scrolls; each key hides and shows its curves
    const list = box.querySelector(".keys"), shown = place.data.filter(t => t.showlegend && t.name && t.name !== "here")
    list.replaceChildren(...shown.map(t => {
        const group = t.legendgroup || t.name, bar = t.type === "bar", colour = bar ? t.marker.color : t.line?.color || t.marker?.color
        const dash = { dash: "5 3", dot: "2 3", dashdot: "6 2 2 2", longdash: "9 3", longdashdot: "9 3 2 3", "2px,8px": "2 6" }[t.line?.dash] || "none"
        const art = document.createElementNS("http://www.w3.org/2000/svg", "svg"), mark = document.createElementNS(art.namespaceURI, bar ? "rect" : t.mode === "markers" ? "circle" : "line")
        const set = (n, has) => Object.entries(has).forEach(([k, v]) => n.setAttribute(k, v))
        set(art, { width: 26, height: 12, "aria-hidden": true })
        set(mark, bar ? { x: 6, width: 14, height: 12, fill: colour } : t.mode === "markers" ? { cx: 13, cy: 6, r: 5, fill: colour }
                      : { x1: 0, x2: 26, y1: 6, y2: 6, stroke: colour, "stroke-width": 3, "stroke-dasharray": dash })
        art.append(mark)
        const key = make("button", { type: "button", onclick: () => {
            const off = key.getAttribute("aria-pressed") === "true", which = place.data.flatMap((x, i) => (x.legendgroup || x.name) === group ? [i] : [])
            key.setAttribute("aria-pressed", !off)
            Plotly.restyle(place, { visible: !off }, which)
        } }, art, make("span", { textContent: t.name }))
        key.setAttribute("aria-pressed", true)
        return make("li", {}, key)
    }))
    list.hidden = shown.length < 2
}

// tables: sorted by a click or a key on a header; a remark stays below its row
function value(text) {
    const n = parseFloat(text.replace(/,/g, "").replace("−", "-"))
    return text === "–" || text === "" ? null : Number.isNaN(n) ? text : n
}
function sort(table, k, th) {
    const up = th.getAttribute("aria-sort") === "ascending" ? -1 : 1
    const groups = [], body = table.tBodies[0]
    for (const r of body.rows) r.cells[0].colSpan > 1 && groups.length ? groups.at(-1).push(r) : groups.push([r])
    const cells = groups.map(g => value(g[0].cells[k].innerText)), words = cells.some(v => typeof v === "string")
    const order = (a, b) => a === null || b === null ? (a === null) - (b === null) : up * (words ? `${a}`.localeCompare(`${b}`) : a - b)
    const by = groups.map((g, i) => [g, cells[i]]).sort((a, b) => order(a[1], b[1]))
    body.append(...by.flatMap(([g]) => g))
    for (const h of th.parentNode.cells) h.setAttribute("aria-sort", h === th ? (up > 0 ? "ascending" : "descending") : "none")
}
async function copy(table, button) { // as a spreadsheet takes it
    const text = [...table.rows].map(r => [...r.cells].map(c => c.textContent.trim()).join("\t")).join("\n")
    try { await navigator.clipboard.writeText(text) }
    catch { const t = make("textarea", { value: text }); document.body.append(t); t.select(); document.execCommand("copy"); t.remove() }
    button.textContent = "copied"
    setTimeout(() => button.textContent = "copy", 1500)
}
for (const box of all(document, ".table")) {
    const table = box.querySelector("table"), button = make("button", { type: "button", className: "copy", textContent: "copy", onclick: () => copy(table, button) })
    const heads = [...table.tHead.rows[0].cells]
    if (table.tBodies[0].rows.length > 1) heads.forEach((th, k) => {
        if (!th.textContent) return
        const name = make("button", { type: "button", onclick: () => sort(table, k, th) }, ...th.childNodes)
        th.replaceChildren(name)
        th.setAttribute("aria-sort", "none")
    })
    box.querySelector(".rows").after(button)
}

const figures = all(document, "figure[data-figure]"), redraw = () => figures.forEach(draw)
figures.forEach(box => { // one at a time: what is on the screen first
    setTimeout(() => { draw(box); new ResizeObserver(() => small(box) !== box.narrow && draw(box)).observe(box) })
})
dark.addEventListener("change", redraw)
addEventListener("beforeprint", () => { paper = true; for (const d of all(document, "details")) d.open = true; redraw() })
addEventListener("afterprint", () => { paper = false; redraw() })
}
