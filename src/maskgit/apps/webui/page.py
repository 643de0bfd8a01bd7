"""The page as a whole, on its own and as part of a server."""

import html
from importlib import resources
from typing import TYPE_CHECKING, Any

import gradio as gr

from maskgit.apps.cli.flags import Marking
from maskgit.apps.webui import PRIVATE_FOLDER
from maskgit.apps.webui.compare_tab import compare_tab
from maskgit.apps.webui.edit_tab import edit_tab
from maskgit.apps.webui.generate_tab import generate_tab
from maskgit.apps.webui.inside_tab import inside_tab
from maskgit.apps.webui.pictures import KEPT, Shelf
from maskgit.apps.webui.session import Studio
from maskgit.pipeline import MaskGIT

if TYPE_CHECKING:
    from fastapi import FastAPI

# Fonts that are there already; nothing is fetched.
FONT = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")
# A 100-megapixel photo as PNG is hardly larger.
MAX_UPLOAD = "400mb"


def build_page(pipe: MaskGIT, name: str, marking: Marking | None = None) -> gr.Blocks:
    """Return the page of a model.

    Args:
        pipe: the model.
        name: what it was loaded by; pictures say so, and are remade by a page of the same name.
        marking: what files say of where their pictures come from; None is the defaults.
    """
    studio = Studio(pipe, name, Shelf(PRIVATE_FOLDER), marking or Marking())
    with gr.Blocks(title="MaskGIT", analytics_enabled=False, delete_cache=(3600, KEPT)) as page:
        gr.HTML(_header(studio), elem_classes="masthead")
        with gr.Tabs():
            for title, tab in TABS.items():
                with gr.Tab(title):
                    tab(studio)
    page.queue(api_open=False)
    return page


TABS = {"Generate": generate_tab, "Edit": edit_tab, "Inside": inside_tab, "Compare": compare_tab}


def _header(studio: Studio) -> str:
    config = studio.pipe.config
    facts = (
        studio.name,
        f"{config.image_size} × {config.image_size} pixels",
        f"{config.transformer.num_classes} classes",
        str(studio.pipe.device),
    )
    listed = "".join(f"<li>{html.escape(fact)}</li>" for fact in facts)
    return f"<h1>MaskGIT</h1><ul>{listed}</ul>"


def mount(
    app: "FastAPI", pipe: MaskGIT, name: str, *, path: str = "/", marking: Marking | None = None
) -> "FastAPI":
    """Put the page of a model into a server.

    Args:
        app: the server; whatever else answers below `path` must have been added before.
        pipe, name, marking: as for `build_page`.
        path: where the page is.
    """
    data = resources.files("maskgit").joinpath("assets/webui")
    options: dict[str, Any] = {
        "server_name": "127.0.0.1",
        "footer_links": [],
        "run_history": False,
        "show_error": False,
        "ssr_mode": False,
        "pwa": False,
        "mcp_server": False,
        "enable_monitoring": False,
        "max_file_size": MAX_UPLOAD,
        "theme": theme(),
        "css": data.joinpath("page.css").read_text("utf-8"),
    }
    return gr.mount_gradio_app(app, build_page(pipe, name, marking), path, **options)


def theme() -> gr.themes.Base:
    """Return the page's colours and shapes, for light and dark."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.indigo,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_md,
        font=FONT,
        font_mono=MONO,
    ).set(
        body_background_fill="#fbfaf7",
        body_background_fill_dark="#131416",
        body_text_color="#1d1c1a",
        body_text_color_dark="#ece9e2",
        body_text_color_subdued="#6b6860",
        body_text_color_subdued_dark="#9d998f",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#1b1d20",
        background_fill_secondary="#f4f1ea",
        background_fill_secondary_dark="#212327",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1b1d20",
        block_border_color="#e5e1d8",
        block_border_color_dark="#2d3035",
        block_label_text_color="#6b6860",
        block_label_text_color_dark="#9d998f",
        block_title_text_color="#1d1c1a",
        block_title_text_color_dark="#ece9e2",
        block_title_text_weight="550",
        block_info_text_color="#6b6860",
        block_info_text_color_dark="#9d998f",
        border_color_primary="#e5e1d8",
        border_color_primary_dark="#2d3035",
        input_background_fill="#fbfaf7",
        input_background_fill_dark="#131416",
        input_border_color="#e5e1d8",
        input_border_color_dark="#2d3035",
        slider_color="#2f5bd7",
        slider_color_dark="#8fb0ff",
        button_primary_background_fill="#2f5bd7",
        button_primary_background_fill_hover="#2449b3",
        button_primary_background_fill_dark="#4a72e8",
        button_primary_background_fill_hover_dark="#5f84f0",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        button_secondary_background_fill="#eeeae1",
        button_secondary_background_fill_hover="#e5e1d8",
        button_secondary_background_fill_dark="#2a2d32",
        button_secondary_background_fill_hover_dark="#34383e",
        color_accent="#2f5bd7",
    )
