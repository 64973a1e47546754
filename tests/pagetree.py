"""A page, parsed."""

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "wbr"}
HOSTILE = "<script>alert('x')</script> & \"quotes\""


class Node:
    def __init__(self, tag, attrs, parent):
        self.tag, self.attrs, self.parent, self.children = tag, attrs, parent, []

    @property
    def text(self):
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def all(self, tag=None, cls=None):
        """Every node below with this tag and class, in document order."""
        found = []
        for child in self.children:
            if isinstance(child, Node):
                if tag in (None, child.tag) and (cls is None or cls in child.attrs.get("class", "").split()):
                    found.append(child)
                found += child.all(tag, cls)
        return found


class Tree(HTMLParser):
    """Parse a page into nodes; a tag that is closed in the wrong place or not at all is an error."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.root = self.here = Node("root", {}, None)
        self.feed(html)
        self.close()
        assert self.here is self.root, f"<{self.here.tag}> is never closed"

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), f"<{tag}> has an attribute twice"
        node = Node(tag, dict(attrs), self.here)
        self.here.children.append(node)
        if tag not in VOID:
            self.here = node

    def handle_endtag(self, tag):
        assert tag == self.here.tag, f"</{tag}> closes <{self.here.tag}>"
        self.here = self.here.parent

    def handle_data(self, data):
        self.here.children.append(data)


def parse(path):
    """A page's nodes, after the checks that every page must pass: well-formed and without any outside reference."""
    html = path.read_bytes().decode("utf-8")
    root = Tree(html).root
    assert not re.search(r"https?:|//[a-z]|url\(|@import", html)
    for node in root.all():
        assert not {"href", "srcset", "action"} & set(node.attrs)
        assert not [name for name in node.attrs if name.startswith("on")]
        assert node.attrs.get("src", "data:image/").startswith("data:image/")
    assert root.all("meta")[2].attrs["content"].startswith("default-src 'none'")
    return root


def place(node):
    """left and width of a box, in per cent."""
    return tuple(float(x) for x in re.fullmatch(r"left:([\d.]+)%;width:([\d.]+)%", node.attrs["style"]).groups())
