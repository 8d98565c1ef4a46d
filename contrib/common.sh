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

# Run a command; what it printed is of interest only when it failed.
quietly() {
	local log
	log=$(mktemp)
	if "$@" >"$log" 2>&1 </dev/null; then
		rm "$log"
		return
	fi
	tail -n 60 "$log" >&2
	rm "$log"
	return 1
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
		quietly apt-get update &&
			quietly apt-get install -y --no-install-recommends "${missing[@]}"
	} || die "apt-get could not install ${missing[*]}"
}

# The first Python of 3.11 or newer that can make environments and be built against.
find_python() {
	local python
	for python in python3 /usr/bin/python3 python3.14 python3.13 python3.12 python3.11; do
		if command -v "$python" >/dev/null &&
			"$python" - 2>/dev/null <<-'END'
				import ensurepip, pathlib, sys, sysconfig
				header = pathlib.Path(sysconfig.get_path("include"), "Python.h")
				sys.exit(sys.version_info < (3, 11) or not header.exists())
			END
		then
			command -v "$python"
			return
		fi
	done
	die "needs Python 3.11 or newer"
}

# Changes whenever what is installed from here would.
source_stamp() {
	(cd "$top" && find pyproject.toml README.md LICENSE zswapfs native \
		\( -name __pycache__ -o -path native/test -o -path native/fuzz \) -prune -o -type f -print0 |
		LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum | cut -d' ' -f1)
}

# Build and install the package into .venv; $1 names the extras, like [test].
install_package() {
	local extras=${1:-} stamp python
	stamp=$(source_stamp)
	if [ ! -x "$venv/bin/python" ] || ! "$venv/bin/python" -c '' 2>/dev/null; then
		python=$(find_python) || exit 1
		say "making .venv"
		quietly "$python" -m venv --clear "$venv" || die "$python -m venv failed"
	fi
	# What was installed last, and with which extras.
	if grep -qsxF -- "$stamp $extras" "$venv/.zswapfs-stamp"; then
		return
	fi
	say "building zswapfs"
	(cd "$top" && quietly "$venv/bin/python" -m pip install --disable-pip-version-check ".$extras") ||
		die "the build failed"
	printf '%s\n' "$stamp " "$stamp $extras" >"$venv/.zswapfs-stamp"
}

# Everything that running zswapfs takes.
setup() {
	[ "$(uname -s)" = Linux ] || die "needs Linux"
	command -v apt-get >/dev/null || die "knows only Debian and Ubuntu (no apt-get here); see README.md"
	need_packages python3 python3-venv python3-dev gcc cmake ninja-build pkg-config \
		libfuse3-dev fuse3 liblz4-dev libxxhash-dev util-linux mount kmod
	install_package "${1:-}"
}

# A link at $2 to $1. The checkout that was set up last has it; what is not a link into some
# checkout's .venv is another's. Dangling links, of checkouts that are gone, are nobody's.
link() {
	if [ -e "$2" ] && [[ $(readlink "$2") != */.venv/bin/* ]]; then
		say "$2 is not ours, left as it is"
	else
		ln -sfn "$1" "$2"
	fi
}

# mount(8) and fstab find their helper in /sbin only.
link_commands() {
	link "$venv/bin/mount.fuse.zswapfs" /sbin/mount.fuse.zswapfs
	link "$venv/bin/zswapfs" /usr/local/sbin/zswapfs
}
