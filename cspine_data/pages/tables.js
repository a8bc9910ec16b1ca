"use strict";
// Rows are sorted by the column whose heading is pressed; figures by their first number, words as words.
const figure = (text) => { const found = text.match(/[-+]?\d+(\.\d+)?(e[-+]?\d+)?/); return found && text.trim().search(/[-+\d]/) === 0 ? Number(found[0]) : NaN; };
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const down = heading.getAttribute("aria-sort") !== "descending";
      table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = Array.from(body.rows, (row) => {
        const text = row.cells[column].textContent;
        return { row, text, number: figure(text) };
      });
      rows.sort((a, b) => {
        if (Number.isNaN(a.number) !== Number.isNaN(b.number)) return Number.isNaN(a.number) ? 1 : -1;
        const order = Number.isNaN(a.number) ? b.text.localeCompare(a.text) : b.number - a.number;
        return down ? order : -order;
      });
      body.append(...rows.map((one) => one.row));
    });
  });
}
// Words in the box: what shows all of them stays.
const box = document.getElementById("filter");
const shown = document.getElementById("shown");
box.closest(".find").hidden = false;
box.addEventListener("input", () => {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  let count = 0;
  for (const one of document.querySelectorAll("table.sortable tbody tr, figure.filtered")) {
    const text = (one.dataset.caption || Array.from(one.cells || [], (cell) => cell.textContent).join(" ")).toLowerCase();
    one.hidden = !words.every((word) => text.includes(word));
    count += !one.hidden;
  }
  shown.textContent = words.length ? `${count} rows and figures` : "";
});
