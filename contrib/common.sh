# What quickstart and test share; sourced, not run.
# shellcheck shell=bash

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$top/.venv

die() {
	echo "${0##*/}: $*" >&2
	exit 1
}

say() {
	echo "== $*"
}

# Install those of the named Debian packages that are missing.
need_packages() {
	local missing=() package
	for package in "$@"; do
		dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' ||
			missing+=("$package")
	done
	[ ${#missing[@]} -eq 0 ] && return
	[ "$(id -u)" = 0 ] || die "not root, and these packages are missing: ${missing[*]}"
	say "installing ${missing[*]}"
	export DEBIAN_FRONTEND=noninteractive
	apt-get install -qq --no-install-recommends "${missing[@]}" >/dev/null 2>&1 || {
		apt-get update -qq && apt-get install -qq --no-install-recommends "${missing[@]}" >/dev/null
	} || die "apt-get could not install ${missing[*]}"
}

# The first Python of 3.11 or newer.
find_python() {
	local python
	for python in python3 python3.13 python3.12 python3.11; do
		if command -v "$python" >/dev/null &&
			"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
			command -v "$python"
			return
		fi
	done
	die "needs Python 3.11 or newer"
}

# Changes whenever what is installed from here would.
source_stamp() {
	(cd "$top" && find pyproject.toml README.md LICENSE zswapfs native -type f -not -name '*.pyc' -print0 |
		sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)
}

# Build and install the package into .venv; $1 names the extras, like [test].
install_package() {
	local extras=${1:-} stamp
	stamp=$(source_stamp)$extras
	if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
		say "making .venv"
		"$(find_python)" -m venv --clear "$venv" || die "python3 -m venv failed"
	fi
	if [ "$(cat "$venv/.zswapfs-stamp" 2>/dev/null)" = "$stamp" ] ||
		[ "$(cat "$venv/.zswapfs-stamp" 2>/dev/null)" = "$(source_stamp)[test,lint]" ]; then
		return
	fi
	say "building zswapfs"
	(cd "$top" && "$venv/bin/python" -m pip install -q --disable-pip-version-check ".$extras") ||
		die "the build failed"
	echo "$stamp" >"$venv/.zswapfs-stamp"
}

# Everything that running zswapfs takes.
setup() {
	[ "$(uname -s)" = Linux ] || die "needs Linux"
	command -v apt-get >/dev/null || die "knows only Debian and Ubuntu (no apt-get here); see README.md"
	need_packages python3 python3-venv python3-dev gcc cmake ninja-build pkg-config \
		libfuse3-dev fuse3 liblz4-dev libxxhash-dev util-linux mount kmod
	install_package "${1:-}"
}

# A link at $2 to $1, unless something else is there.
link() {
	if [ -L "$2" ] || [ ! -e "$2" ]; then
		ln -sfn "$1" "$2"
	fi
}

# mount(8) and fstab find their helper in /sbin only.
link_commands() {
	link "$venv/bin/mount.fuse.zswapfs" /sbin/mount.fuse.zswapfs
	link "$venv/bin/zswapfs" /usr/local/sbin/zswapfs
}
