"""Modules that `nnx.view` switches between training and evaluation."""

from .._arguments import check_flag


class Switchable:
    """Gives a module `set_view`, which `nnx.view` calls."""

    deterministic: bool

    def set_view(self, deterministic: bool | None = None) -> None:
        """Switches between training and evaluation; `nnx.view` calls it.

        Args:
          deterministic: if True, this is evaluation. None changes nothing.
        """
        if deterministic is not None:
            self.deterministic = check_flag("deterministic", deterministic)
