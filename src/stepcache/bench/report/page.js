"use strict";
// The report around the players: its theme, and a table that scrolls and sorts.
document.getElementById("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});

const scroll = document.querySelector(".scroll");
const more = () =>
  scroll.parentElement.classList.toggle("more", scroll.scrollLeft + scroll.clientWidth < scroll.scrollWidth - 1);
scroll.addEventListener("scroll", more);
new ResizeObserver(more).observe(scroll);

document.querySelectorAll("#table thead th").forEach((head, column) => {
  head.querySelector("button").addEventListener("click", () => {
    const body = document.querySelector("#table tbody");
    const down = head.getAttribute("aria-sort") !== "descending";
    const value = (row) => row.children[column].textContent.trim();
    const number = (row) => (value(row) === "same" ? Infinity : parseFloat(value(row)));
    const order = (a, b) => {
      if (column === 0) return value(a).localeCompare(value(b));
      const [x, y] = [number(a), number(b)];
      return (Number.isNaN(x) ? -Infinity : x) - (Number.isNaN(y) ? -Infinity : y) || 0;
    };
    const rows = [...body.rows].sort(order);
    if (down) rows.reverse();
    document.querySelectorAll("#table thead th").forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...rows);
  });
});
