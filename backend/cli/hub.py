"""`python -m backend hub`: the hub's config and interface."""

from functools import partial
from typing import Annotated

import typer

from backend.cli.common import group, settings_of_hub
from backend.errors import StartRefusedError

hub = group("hub", "The hub's config and interface.")


@hub.command()
def init(
    recover: Annotated[
        bool, typer.Option("--recover", help="Take the key of the interface that has the hub's name.")
    ] = False,
    new_key: Annotated[
        bool, typer.Option("--new-key", help="Make a new key though nodes know another one of this hub.")
    ] = False,
) -> None:
    """Write a config where WIREGUARD_CONFIG_PATH has none, with the hub's key if it had one."""
    from backend.cli.quickstart import beside_lost, make_config
    from backend.models.operator_commands import command
    from backend.settings import load_settings

    if recover and new_key:
        raise StartRefusedError("--recover keeps the key and --new-key doesn't; leave one of them out")
    settings = beside_lost(load_settings())
    if make_config(settings, typer.echo, recover=recover, new_key=new_key):
        typer.echo(f"{command('hub up')} brings {settings.interface} up")
    else:
        typer.echo(f"{settings.wireguard_config_path} is there already and was left as it is")


@hub.command()
def up(
    replace_key: Annotated[
        bool,
        typer.Option(
            "--replace-key",
            help="Give the interface the file's key, which WIREGUARD_HUB_PUBLIC_KEY names too.",
        ),
    ] = False,
) -> None:
    """Make the hub's interface from its config, or see that it is up."""
    from backend.adapters.wireguard import hub_key
    from backend.cli.quickstart import bring_up

    settings = settings_of_hub()
    if replace_key and (
        replaced := hub_key.replace(settings.wireguard_config_path, settings.wireguard_hub_public_key)
    ):
        typer.echo(f"interface {settings.interface} had the key {replaced.before or '(none)'}")
        typer.echo(f"interface {settings.interface} has the key {replaced.after}")
    bring_up(settings, typer.echo, partial(typer.echo, err=True))


@hub.command()
def down() -> None:
    """Take the hub's interface away, if it has the config's key."""
    from backend.adapters.wireguard import link

    settings = settings_of_hub()
    taken = link.down(settings.wireguard_config_path)
    typer.echo(f"interface {settings.interface} {'is gone' if taken else 'was not there'}")


@hub.command()
def show() -> None:
    """Say what the hub is and has, without any secret."""
    from backend.adapters.wireguard import link

    settings = settings_of_hub()
    state = link.show(
        settings.wireguard_config_path, settings.wireguard_hub_ip, settings.wireguard_hub_public_key
    )
    on_interface = (
        "" if state.peers_on_interface is None else f", {state.peers_on_interface} on the interface"
    )
    for name, value in (
        ("config", settings.wireguard_config_path),
        ("interface", f"{settings.interface} ({state.state})"),
        ("public key", state.public_key),
        ("endpoint", settings.wireguard_hub_endpoint),
        ("listening port", "-" if state.listen_port is None else state.listen_port),
        ("peers", f"{state.peers_in_file} in the file{on_interface}"),
    ):
        typer.echo(f"{name + ':':16}{value}")
    for problem in state.problems:
        typer.echo(f"note: {problem}", err=True)
