"""Reads a report as a screen reader would."""

from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Reader(HTMLParser):
    """Reads a page as a screen reader would: text, headings, tables and what refers to what."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.refers = [], [], [], []
        self.headings, self.rows, self.text = [], [], []
        self.feed(text)
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.refers += (attrs.get("aria-labelledby") or "").split()
        self.refers += [value[1:] for name, value in attrs.items() if name.endswith("href") and value.startswith("#")]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append((self.open[-1], data))
        if {"th", "td"} & set(self.open) and self.rows:
            self.rows[-1][-1] += data.strip()
