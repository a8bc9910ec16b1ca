"""Self-contained HTML pages: one style, tables that sort and filter, no request to any other address."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

_PACKAGE = "cspine_data.pages"


def render_page(package: str, folder: str, template: str, **values: Any) -> str:
    """Render a page; all values are escaped.

    Parameters
    ----------
    package, folder, template : str
        The template, in a folder of a package. It can include ``page.css`` and ``find.html.jinja``, the box that
        filters rows and figures, and print ``script``, which sorts and filters. ``csp`` is the content security
        policy: pictures and styles of the page itself, and this script.
    **values
        Values of the template.
    """
    from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    script = files(_PACKAGE).joinpath("tables.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    pages = Environment(
        loader=ChoiceLoader([PackageLoader(package, folder), PackageLoader("cspine_data", "pages")]),
        autoescape=True,
        undefined=StrictUndefined,
    )
    # The browser runs only the script of this digest.
    return pages.get_template(template).render(script=Markup(script), csp=Markup(policy), **values)  # noqa: S704
