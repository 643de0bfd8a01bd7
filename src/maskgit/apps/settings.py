"""What a request may set, described once: `--help`, OpenAPI and the server's schemas take words and ranges from here.

No library is imported, so that `--help` answers at once.
"""

from typing import Any, NamedTuple


class Setting(NamedTuple):
    """A setting.

    Attributes:
        help: what it does, in a sentence.
        low, high: the range of a number, both ends included.
    """

    help: str
    low: Any = None
    high: Any = None


CURVES = (
    "constant, linear[:FROM,TO], cosine[:FROM,TO], power-cosine:POWER[,FROM,TO] or interval:LOW,HIGH, over "
    "decoding progress from 0 to 1, each step's end; with @before after it, each step's beginning"
)
SETTINGS = {
    # The sampler's, by their names in `SamplerConfig`.
    "steps": Setting(
        "Decoding steps, each a forward pass. More is slower and usually better; adaptive policies may stop earlier.",
        1,
        10_000,
    ),
    "policy": Setting(
        "Policy that chooses which tokens to keep after each step; `maskgit policies` lists them."
    ),
    "policy_options": Setting("Parameters of the policy."),
    "mask_schedule": Setting(
        "Share of tokens still masked as decoding progresses: cosine, uniform, square, cubic, sqrt, log, exp, arccos, "
        "or powX such as pow2.5."
    ),
    "temperature": Setting(
        "Divides the logits before sampling. Lower is more conservative; 0 always takes the most likely token.",
        0,
        1e6,
    ),
    "temperature_schedule": Setting(f"Curve that scales the temperature: {CURVES}."),
    "choice_temperature": Setting(
        "Noise on the confidence that decides which tokens to keep. Higher is more varied.", 0, 1e6
    ),
    "choice_schedule": Setting("Curve that scales the choice temperature; same forms."),
    "guidance_scale": Setting(
        "Guidance scale: away from the prediction without the class, or of the guide; 1 is no guidance.",
        0,
        1000,
    ),
    "guidance_schedule": Setting(
        "Curve from no guidance (0) to the full guidance scale (1); same forms as the temperature's."
    ),
    "top_k": Setting("Sample each token from this many likeliest codes alone; 0 is all.", 0, 2**18),
    "top_p": Setting(
        "Sample each token from the fewest likeliest codes with this probability together; 1 is all.", 0, 1
    ),
    "force_guidance": Setting("Apply guidance even to a model that was trained without label dropout."),
    "tables": Setting(
        "Values for every step in place of the curves: mask_ratio, temperature, choice_temperature, guidance_scale."
    ),
    # What is drawn.
    "num_images": Setting("Number of images.", 1),
    "seed": Setting("Random seed; seed and index together determine an image.", 0, 2**64 - 1),
    "first_index": Setting(
        "Index of the first image; continue where an earlier run ended to get new images.", 0, 2**62
    ),
    "priority": Setting("low lets all other requests go first."),
    # Of edits.
    "rule": Setting(
        "Tokens that a box masks: cover is every token it touches, official follows the official notebook."
    ),
    "start_step": Setting("Step to start decoding at.", 0, 9999),
    "feather": Setting("Radius in pixels of the soft edge between photo and new content.", 0),
    "invert": Setting("Replace what the mask leaves out, and keep what it marks."),
    "share": Setting(
        "Share of a token's pixels that the mask must mark before the token is replaced; 0 is any pixel.",
        0,
        1,
    ),
    "dilate": Setting("Number of tokens to grow the mask by.", 0),
    "strength": Setting("Share of tokens to replace: 0 is the reconstruction, 1 a new image.", 0, 1),
    "left": Setting("Pixels to add on the left.", 0),
    "right": Setting("Pixels to add on the right.", 0),
    "top": Setting("Pixels to add at the top.", 0),
    "bottom": Setting("Pixels to add at the bottom.", 0),
    "canvas": Setting("Width and height of the result, in place of the pixels to add."),
    "position": Setting(
        "Where the photo's top left corner goes on the canvas, x and y; default: the middle."
    ),
    "inner_feather": Setting("Pixels inside the photo over which it blends into the new content.", 0),
}
