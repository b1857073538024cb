"""Section `init`: where a block's weights come from."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, create_model, model_validator

from dbtrain.config.section import Count, Section

RANDOM = "random"
"""The whole section in one word: nothing but its defaults."""

FROM = (
    "A run that is merged or done, a merged model, one shard, or a safetensors file (or a folder of them with an "
    "index) with the model's names; null for random weights, which are a function of (seed, block)"
)

if TYPE_CHECKING:
    _From = Section
else:
    # a field that is called as its key is: an alias would make every reader of the sections know two names
    _From = create_model("_From", __base__=Section, **{"from": (str | None, Field(None, description=FROM))})


class BranchConfig(Section):
    """One network of a block's size is trained over all levels first, then copied into every block."""

    steps: Count


class InitConfig(_From):
    """Where weights come from before the first step: `init: random`, or the weights of another model."""

    layers: Literal["slice", "repeat"] = "slice"
    """`slice`: each block takes its own layers, by number, of a network of the same depth. `repeat`: every
    block starts from all layers of a network of a block's depth."""
    stem: Literal["private", "frozen"] = "private"
    """`private`: each block has a copy that it trains. `frozen`: one stem for all blocks,
    stored once with the run and never trained."""
    head: Literal["private", "frozen"] = "private"
    branch: BranchConfig | None = None

    @property
    def source(self) -> str | None:
        """The value of the key `from`, which is no name in Python."""
        return getattr(self, "from")  # noqa: B009  self.from is no Python

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parameter groups that are not trained: of `stem` and `head` those that are frozen."""
        return tuple(group for group in ("stem", "head") if getattr(self, group) == "frozen")

    @model_validator(mode="after")
    def _one_source(self) -> "InitConfig":
        frozen = " and ".join(f"init.{group}=frozen" for group in self.frozen)
        if self.branch and self.source is not None:
            raise ValueError(
                f"init.from={self.source} and init.branch exclude each other: a branch is trained to start from"
            )
        if self.layers == "repeat" and self.source is None and not self.branch:
            raise ValueError(
                "init.layers=repeat starts every block from all layers of init.from, which is not set: set it to a "
                "network of a block's depth, or leave init.layers out"
            )
        if self.branch and self.frozen:
            raise ValueError(f"{frozen} needs weights that are there already: with init.branch leave it out")
        if self.frozen and self.source is None:
            raise ValueError(f"{frozen} would keep random weights: set init.from, or leave it out")
        return self

    def content(self) -> dict[str, Any]:
        """What determines the weights: all keys that are not as by default, so that runs of before go on."""
        return self.model_dump(mode="json", exclude_defaults=True)


def _word(value: Any) -> Any:
    return {} if value is None or value == RANDOM else value


AnyInit = Annotated[InitConfig, BeforeValidator(_word)]
"""The section, or the word `random`."""
