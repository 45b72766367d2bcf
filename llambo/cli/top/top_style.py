"""How `llambo top` is laid out, in Textual's own words."""

from __future__ import annotations

CSS = """
#head { height: 1; padding: 0 1; text-wrap: nowrap; text-overflow: ellipsis; }
#gauges { height: 3; padding: 0 1; text-wrap: nowrap; }

#panes { height: 1fr; layout: vertical; }
#panes > * { height: 2fr; border: round $secondary; border-title-align: left; }
#panes > #events { height: 1fr; min-height: 4; }
#panes > *:focus { border: round $accent; border-title-style: bold; }
#panes > DataTable { scrollbar-size-horizontal: 0; }
#panes.stale > * { opacity: 60%; }

/* What is told by a background needs another sign where there are no colours. */
.plain DataTable > .datatable--cursor { text-style: reverse; }
.plain #panes > *:focus { border: heavy $accent; }

/* Where there is little room, most of it is for what has the keyboard. */
#panes.low > *:focus { height: 4fr; }

#panes.wide { layout: grid; grid-size: 2 2; grid-rows: 3fr 1fr; }
#panes.wide > *, #panes.wide > *:focus { height: 1fr; }
#panes.wide > #events { column-span: 2; }

#filter { border: round $accent; height: 3; }

ModalScreen { align: center middle; }
.box {
    border: round $accent; background: $surface; padding: 0 1;
    width: auto; max-width: 95%; height: auto; max-height: 90%;
}
.box Static { width: auto; max-width: 100%; }
.page { width: 90%; }
.page Static { width: 1fr; }
"""
