"""wg(8), ip(8) and wireguard-go."""
