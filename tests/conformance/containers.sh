# Forks in containers: engines inside of containers, builds, and podman for root and for an ordinary user. The engine is one of its
# own, without a network; what it needs and this machine has not is said, and left out.

run_containers() {
  scripts/setup containers
  containers_prepare
  check "containers: the tests with an engine" containers_engine
  check "containers: an agent and its engine in one container" containers_inside
  check "containers: an engine in a container beside the agent" containers_beside
  if docker buildx version >/dev/null 2>&1 && (($(docker version --format '{{.Server.Version}}' | cut -d. -f1) >= 23)); then
    check "containers: docker build" containers_build
  else
    echo "left out  containers: docker build: needs Docker 23 or newer, with buildx"
  fi
  check "containers: podman as root" podman_root
  check "containers: podman build" podman_build
  check "containers: podman as an ordinary user" podman_user
  docker ps -aq | xargs -r docker rm -f >/dev/null
  kill "$engine_pid"
  wait "$engine_pid" || true
}

# An engine of its own, and one image: busybox, and links to the /usr that a container may be given.
containers_prepare() {
  local program root="$work/image" options=(--bridge none "--iptables=false")
  mkdir -p "$root"/{bin,etc,proc,sys,dev,run,tmp,var,root,usr}
  chmod 1777 "$root/tmp"
  cp "$(command -v busybox)" "$root/bin/busybox"
  for program in $(busybox --list); do
    [[ $program == busybox ]] || ln -s busybox "$root/bin/$program"
  done
  ln -s usr/lib "$root/lib"
  ln -s usr/lib64 "$root/lib64"
  echo root:x:0:0:root:/root:/bin/sh >"$root/etc/passwd"
  echo root:x:0: >"$root/etc/group"
  tar c -C "$root" . >"$work/image.tar"

  # --privileged gives all rights there are, and so fails where root itself lacks one.
  if ! capability_is_there 24; then
    cat >"$work/runtime" <<'PYTHON'
#!/usr/bin/env python3
import json, os, sys
path = ""
if "--process" in sys.argv:
    path = sys.argv[sys.argv.index("--process") + 1]
elif "--bundle" in sys.argv:
    path = sys.argv[sys.argv.index("--bundle") + 1] + "/config.json"
if path:
    with open(path) as file:
        config = json.load(file)
    for rights in config.get("process", config).get("capabilities", {}).values():
        if "CAP_SYS_RESOURCE" in rights:
            rights.remove("CAP_SYS_RESOURCE")
    with open(path, "w") as file:
        json.dump(config, file)
os.execvp("runc", ["runc"] + sys.argv[1:])
PYTHON
    chmod +x "$work/runtime"
    options+=(--add-runtime "bounded=$work/runtime" --default-runtime bounded)
  fi
  export DOCKER_HOST="unix://$work/engine.sock"
  dockerd -H "$DOCKER_HOST" --data-root "$work/engine" --exec-root "$work/engine-run" --pidfile "$work/engine.pid" "${options[@]}" \
    >"$LOGS/dockerd.log" 2>&1 &
  engine_pid=$!
  for _ in {1..100}; do
    ! docker info >/dev/null 2>&1 || break
    sleep 0.2
  done
  docker import "$work/image.tar" image >/dev/null

  # The limits that podman gives by itself may be more than root here may give.
  printf '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=1000:1000"]\n' >"$work/containers.conf"
  export CONTAINERS_CONF="$work/containers.conf"
}

capability_is_there() {
  (((0x$(awk '$1 == "CapBnd:" { print $2 }' /proc/self/status) >> $1) & 1))
}

containers_engine() {
  cargo test --profile "$PROFILE" --test cli docker:: -- --nocapture 2>&1 | tee "$work/tests"
  ! grep -q "left out" "$work/tests"
}

# Starts a container with an engine of its own: engine_in NAME [OPTION]...
engine_in() {
  docker run -d --name "$1" --privileged --network none -v /usr:/usr:ro -v "$BIN:/bin/forkvol:ro" -v "$work/image.tar:/image.tar:ro" \
    -v "$work/$1/docker:/var/lib/docker" "${@:2}" -e DOCKER_HOST=unix:///run/docker.sock \
    -e PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/bin image \
    sh -c 'mount --make-rshared / && exec dockerd -H unix:///run/docker.sock --bridge none --iptables=false'
  for _ in {1..100}; do
    ! docker exec "$1" docker info >/dev/null 2>&1 || break
    sleep 0.2
  done
  docker exec "$1" docker import /image.tar image
}

containers_inside() {
  local store=("-v" "$work/inside/store:/var/lib/forkvol")
  engine_in inside "${store[@]}"
  docker exec -i inside sh -exu <<'INSIDE'
mkdir -p /src /late
cd /src
docker run -d --name late --network none -v /late:/late:rslave image sleep 600
forkvol attach --strict --job 1 -v shop/npm -p /root/.npm -v shop/modules -p node_modules -v late -p /late/seen --env-file /tmp/env
. /tmp/env
test "$FORKVOL_HIT" = empty
docker run --rm --network none -v "$FORKVOL_DIR_SHOP_NPM:/npm" image sh -c 'echo npm >/npm/f'
docker run --rm --network none -v /root/.npm:/npm -v "$PWD:/src" image sh -c 'cp /npm/f /src/node_modules/g'
chmod 1777 node_modules
docker run --rm --network none --user 1234 -v "$PWD:/src" image sh -c 'touch /src/node_modules/user'
test "$(stat -c %u node_modules/user)" = 1234
echo seen >/late/seen/f
test "$(docker exec late cat /late/seen/f)" = seen
docker rm -f late
forkvol finish --strict --job 1 --status 0
! grep fuse.forkvol /proc/self/mountinfo
INSIDE
  docker rm -f inside
  # The store outlives the container.
  engine_in inside "${store[@]}"
  [[ $(docker exec inside forkvol cat shop/modules:g) == npm ]]
  docker exec inside forkvol check
  docker rm -f inside
}

containers_beside() {
  local mounts="$work/mounts"
  mkdir -p "$mounts" "$work/job"
  mount --bind "$mounts" "$mounts"
  mount --make-shared "$mounts"
  engine_in beside -v "$mounts:$mounts:rslave"
  cd "$work/job"
  forkvol attach --strict --job beside --mount-root "$mounts" -v beside -p cache --env-file env
  source ./env
  chmod 777 cache
  docker exec beside docker run --rm --network none --user 1234 -v "$FORKVOL_DIR_BESIDE:/cache" image sh -c 'echo user >/cache/f'
  docker exec beside docker run -d --network none -v "$FORKVOL_DIR_BESIDE:/cache" image sh -c 'exec sleep 600 </cache/f'
  [[ $(cat cache/f) == user ]]
  forkvol finish --strict --job beside --status 0 2>&1 | tee said
  grep 'still in use by' said
  [[ $(forkvol cat beside:f) == user ]]
  docker exec beside sh -c "! grep $mounts/ /proc/self/mountinfo"
  docker rm -f beside
}

containers_build() {
  mkdir "$work/build"
  cd "$work/build"
  docker import "$work/image.tar" base >/dev/null
  forkvol attach --strict --job build -v build/npm -p npm -v build/modules -p node_modules --env-file "$work/build-env"
  source "$work/build-env"
  echo archive >npm/archive
  head -c 3000000 /dev/urandom >node_modules/large
  printf 'npm\nnode_modules\n' >.dockerignore
  cat >Dockerfile <<'BUILD'
FROM base AS install
RUN --mount=from=npm,target=/npm,rw sh -ec 'cp /npm/archive /got && echo new >/npm/new && cp -a /npm /kept'
COPY . /src
RUN sh -ec '! test -e /src/node_modules && ! test -e /src/npm'
FROM scratch AS npm-cache
COPY --from=install /kept /
BUILD
  docker build --network none --progress plain --target install --build-context npm="$FORKVOL_DIR_BUILD_NPM" -t built .
  [[ $(docker run --rm --network none built cat /got) == archive ]]
  # What the build wrote there is dropped, unless it is what the build gives out.
  [[ $(ls npm) == archive ]]
  docker build --network none --target npm-cache --build-context npm="$FORKVOL_DIR_BUILD_NPM" --output "$FORKVOL_DIR_BUILD_NPM" .
  forkvol finish --strict --job build --status 0
  [[ $(forkvol cat build/npm:new) == new ]]
}

# Podman with a store below $work; containers get no network. crun cannot do with both kinds of control groups at once.
podman_here() {
  podman --root "$work/podman" --runroot "$work/podman-run" --tmpdir "$work/podman-tmp" "$@"
}

one_kind_of_groups() {
  [[ ! -e /sys/fs/cgroup/unified ]] || umount -l /sys/fs/cgroup/unified
}

# Runs a function in a mount namespace of its own, whose mounts are told to those below: in_namespace FUNCTION
in_namespace() {
  export -f podman_here one_kind_of_groups "$1"
  export work BIN
  unshare --mount --propagation private bash -euxc "mount --make-rshared /; one_kind_of_groups; $1"
}

podman_root() {
  in_namespace podman_root_inside
}

podman_root_inside() {
  podman_here import "$work/image.tar" image
  forkvol fork podman "$work/podman-fork"
  chmod 777 "$work/podman-fork"
  podman_here run --rm --network none -v "$work/podman-fork:/cache" image sh -c 'echo root >/cache/root'
  podman_here run --rm --network none --user 1234 -v "$work/podman-fork:/cache" image sh -c 'cat /cache/root; echo user >/cache/user'
  [[ $(stat -c %u "$work/podman-fork/user") == 1234 ]]
  forkvol commit "$work/podman-fork"
  [[ $(forkvol cat podman:user) == user ]]
  # forkvol itself in a container
  mkdir "$work/podman-store"
  podman_here run --rm --network none --device /dev/fuse --cap-add SYS_ADMIN --security-opt apparmor=unconfined -v /usr:/usr:ro \
    -v "$BIN:/bin/forkvol:ro" -v "$work/podman-store:/var/lib/forkvol" image sh -c \
    'forkvol run -v v -p /c -- sh -c "echo x >/c/f" && forkvol cat v:f'
}

podman_build() {
  in_namespace podman_build_inside
}

# Podman binds what it is given, so that what the build writes there is in the fork.
podman_build_inside() {
  mkdir "$work/podman-context"
  cd "$work/podman-context"
  forkvol fork podman-build "$work/podman-npm"
  echo archive >"$work/podman-npm/archive"
  printf 'FROM image\nRUN --mount=type=bind,from=npm,target=/npm,rw sh -ec "cat /npm/archive; echo new >/npm/new"\n' >Dockerfile
  podman_here build --isolation chroot --build-context npm="$work/podman-npm" .
  printf 'FROM image\nRUN sh -ec "cat /npm/new; echo volume >/npm/volume"\n' >Dockerfile
  podman_here build --isolation chroot -v "$work/podman-npm:/npm" .
  forkvol commit "$work/podman-npm"
  [[ $(forkvol cat podman-build:new) == new && $(forkvol cat podman-build:volume) == volume ]]
}

podman_user() {
  in_namespace podman_user_inside
}

# An ordinary user with a range of ids, who has a store, a daemon and forks of their own. All that the machine knows of them is laid over
# its files in this namespace alone.
podman_user_inside() {
  # Podman waits long for each container where the folder's path is long.
  local user="$work/user" runtime="$work/run" file run='podman run --rm --cgroups=disabled --network none'
  mkdir -p "$user"/{bin,etc,home} "$runtime"
  cp "$BIN" "$user/bin"
  cp /etc/passwd /etc/group "$user/etc"
  echo "agent:x:61500:61500::$user/home:/bin/sh" >>"$user/etc/passwd"
  echo agent:x:61500: >>"$user/etc/group"
  echo agent:6150000:65536 | tee "$user/etc/subuid" >"$user/etc/subgid"
  : >"$user/etc/fuse.conf"
  for file in "$user"/etc/*; do
    mount --bind "$file" "/etc/${file##*/}"
  done
  mknod -m 666 "$user/fuse" c 10 229
  mount --bind "$user/fuse" /dev/fuse
  chown 61500:61500 "$user/home" "$runtime"
  chmod 700 "$runtime"
  as_agent() {
    setpriv --reuid 61500 --regid 61500 --init-groups env -i PATH="$user/bin:$PATH" HOME="$user/home" USER=agent \
      XDG_RUNTIME_DIR="$runtime" FORKVOL_STORE="$user/home/store" CONTAINERS_CONF="$CONTAINERS_CONF" bash -euxc "cd; $1"
  }
  as_agent "podman import $work/image.tar image"

  # Without user_allow_other a fork is open to root of such a container, who is the user outside, and to nobody else.
  as_agent "forkvol fork v m
    $run -v ~/m:/cache image sh -c 'echo root >/cache/f'
    test \$(stat -c %u m/f) = 61500
    if $run --userns keep-id -v ~/m:/cache image true; then exit 1; fi
    if $run --user 1000 -v ~/m:/cache image cat /cache/f; then exit 1; fi
    forkvol commit ~/m
    test \$(forkvol cat v:f) = root"

  echo user_allow_other >"$user/etc/fuse.conf"
  as_agent "forkvol fork v m
    $run --userns keep-id -v ~/m:/cache image sh -c 'echo same >/cache/same'
    test \$(stat -c %u m/same) = 61500
    forkvol abandon ~/m
    forkvol fork v m --owner caller
    chmod 777 m
    $run --user 1000 -v ~/m:/cache image sh -c 'echo other >/cache/other'
    test \$(stat -c %u m/other) = 61500
    forkvol commit ~/m
    test \$(forkvol cat v:other) = other"

  # What root mounted is open to all of them.
  forkvol fork podman-shared "$work/podman-shared"
  chown 61500:61500 "$work/podman-shared"
  as_agent "$run --userns keep-id -v $work/podman-shared:/cache image sh -c 'echo shared >/cache/f'"
  forkvol commit "$work/podman-shared"
  [[ $(forkvol cat podman-shared:f) == shared ]]
  # shellcheck disable=SC2016
  as_agent 'forkvol check; forkvol daemon stop --force; kill "$(cat "$XDG_RUNTIME_DIR/libpod/tmp/pause.pid")"'
}
