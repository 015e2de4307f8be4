//! The service: its socket, its store, and the files that set it up.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use super::*;

/// Runs a script in a mount namespace of its own, with nothing under /run, /var/lib and /etc/forkvol.
fn in_a_fresh_system(script: &str) -> Output {
    let fresh = "set -euo pipefail
        mount -t tmpfs none /run; mount -t tmpfs none /var/lib
        start() { forkvol daemon run --socket /run/forkvol/forkvol.sock 2>>/run/log & service=$!
                  for _ in {1..500}; do forkvol daemon status >/dev/null 2>&1 && return; sleep 0.02; done; cat /run/log; exit 1; }
        trap 'forkvol daemon stop --force' EXIT\n";
    Command::new("unshare")
        .args(["-m", "--propagation", "private", "bash", "-c"])
        .arg(format!("{fresh}{script}"))
        .env("PATH", path_variable())
        .env_remove("FORKVOL_STORE")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn who_comes_while_the_service_is_down_is_told_so_and_gets_no_second_store() {
    let output = in_a_fresh_system(
        "start
         forkvol run -v v -p /run/c -- sh -c 'echo kept >/run/c/f'
         [[ $(forkvol daemon status) == */var/lib/forkvol* ]]
         forkvol daemon stop; wait $service
         status=0; forkvol volumes || status=$?
         [[ $status == 12 ]]
         forkvol attach --job 1 -v v -p /run/c >/run/vars
         grep -q FORKVOL_HIT=.empty /run/vars
         start
         [[ $(forkvol cat v:f) == kept ]]",
    );
    let said = well(&output);
    assert!(said.contains("the service does not listen on"), "{said}");
}

#[test]
fn the_service_says_when_it_is_ready_and_when_it_ends() {
    let dir = tempfile::tempdir().unwrap();
    let told = UnixDatagram::bind(dir.path().join("notify")).unwrap();
    told.set_read_timeout(Some(Duration::from_secs(20)))
        .unwrap();
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_forkvol"))
        .args(["daemon", "run", "--store"])
        .arg(dir.path().join("store"))
        .env("NOTIFY_SOCKET", dir.path().join("notify"))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut words = [0; 64];
    let mut next = || {
        let length = told.recv(&mut words).unwrap_or(0);
        text(&words[..length])
    };
    let ready = next();
    let listening = dir.path().join("store/forkvol.sock").exists();
    forkvol::sys::process::kill(daemon.id(), 15).unwrap();
    assert!(daemon.wait().unwrap().success());
    assert_eq!((ready.as_str(), listening), ("READY=1\n", true));
    assert_eq!(next(), "STOPPING=1\n");
}

#[test]
fn who_has_but_a_copy_of_a_mount_does_not_hold_it() {
    let output = in_a_fresh_system(
        "mount --make-rshared /
         start
         # As the sandboxes of services have it: what is mounted and unmounted outside follows.
         unshare -m --propagation slave sleep 60 & sandbox=$!
         id=$(forkvol fork v /run/c)
         for _ in {1..500}; do ! grep -q ' /run/c ' /proc/$sandbox/mountinfo || break; sleep 0.02; done
         forkvol commit $id 2>/run/said
         [[ ! -s /run/said ]] || { cat /run/said; exit 1; }
         ! grep -q ' /run/c ' /proc/$sandbox/mountinfo
         kill $sandbox
         # A copy of its own stays behind, and is named.
         id=$(forkvol fork v /run/c)
         unshare -m --propagation private sleep 60 & holder=$!
         for _ in {1..500}; do [[ $(readlink /proc/$holder/ns/mnt) == $(readlink /proc/self/ns/mnt) ]] || break; sleep 0.02; done
         sleep 0.2
         forkvol commit $id
         kill $holder",
    );
    let said = well(&output);
    assert!(said.contains("another mount namespace"), "{said}");
}

#[test]
fn the_service_needs_no_rights_and_is_for_its_group() {
    let output = in_a_fresh_system(
        "cp \"$(command -v forkvol)\" /run/program
         mkdir -m 755 /run/forkvol; mkdir -m 700 /var/lib/forkvol; chown daemon:daemon /run/forkvol /var/lib/forkvol
         as() { HOME=/run setpriv --reuid=$1 --regid=$2 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all \"${@:3}\"; }
         as daemon daemon /run/program daemon run --socket /run/forkvol/forkvol.sock --group daemon 2>/run/log &
         for _ in {1..500}; do [[ ! -S /run/forkvol/forkvol.sock ]] || break; sleep 0.02; done
         forkvol run -v v -p /run/c -- sh -c 'echo kept >/run/c/f'
         [[ $(as nobody daemon /run/program cat v:f) == kept ]]
         status=0; as nobody nogroup /run/program cat v:f || status=$?
         [[ $status == 12 ]]",
    );
    let said = well(&output);
    assert!(said.contains("join the group daemon"), "{said}");
}

fn install(folder: &Path, more: &[&str]) -> Output {
    Command::new(scripts().join("systemd/install"))
        .arg("--destdir")
        .arg(folder)
        .args(more)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[test]
fn an_installation_is_whole_repeatable_and_goes_without_its_store() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    let binary = ["--binary", env!("CARGO_BIN_EXE_forkvol")];
    well(&install(root, &binary));
    let unit = fs::read_to_string(root.join("etc/systemd/system/forkvol.service")).unwrap();
    for line in unit.lines().filter(|l| l.starts_with("Exec")) {
        let (_, command) = line.split_once('=').unwrap();
        let program = command.split(' ').next().unwrap().trim_start_matches('-');
        assert!(root.join(&program[1..]).is_file(), "{line}");
    }
    let hooks = root.join("usr/local/share/forkvol/buildkite");
    well(
        &Command::new("bash")
            .arg(hooks.join("agent-hooks/agent-startup"))
            .env("PATH", "/usr/bin:/bin")
            .output()
            .unwrap(),
    );
    let again = well(&install(root, &binary));
    assert!(again.contains("nothing has changed"), "{again}");

    // Settings are the owner's, and what is old is brought up to date.
    let settings = root.join("etc/forkvol/config.toml");
    fs::write(&settings, "group = \"ci\"\n").unwrap();
    fs::write(hooks.join("lib.sh"), "old").unwrap();
    let changed = well(&install(root, &binary));
    assert!(
        changed.contains("lib.sh") && !changed.contains("config.toml"),
        "{changed}"
    );
    assert_eq!(
        fs::read(hooks.join("lib.sh")).unwrap(),
        fs::read(scripts().join("buildkite/lib.sh")).unwrap()
    );

    let store = root.join("var/lib/forkvol");
    fs::create_dir_all(&store).unwrap();
    fs::write(store.join("state"), "precious").unwrap();
    well(&install(root, &["--uninstall"]));
    assert_eq!(fs::read_to_string(store.join("state")).unwrap(), "precious");
    assert_eq!(fs::read_to_string(&settings).unwrap(), "group = \"ci\"\n");
    for gone in [
        "usr/local/bin/forkvol",
        "etc/systemd/system/forkvol.service",
        "usr/local/share/forkvol",
        "usr/local/share/man/man1/forkvol.1",
    ] {
        assert!(!root.join(gone).exists(), "{gone}");
    }
    assert!(!install(root, &["--binary", "/nothing"]).status.success());
}

#[test]
fn systemd_understands_the_unit() {
    let found = Command::new("systemd-analyze").arg("--version").output();
    if !found.is_ok_and(|o| o.status.success()) {
        eprintln!("systemd-analyze is not here: the unit is not looked at");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    well(&install(root, &["--binary", env!("CARGO_BIN_EXE_forkvol")]));
    let units = root.join("usr/lib/systemd");
    fs::create_dir_all(&units).unwrap();
    let copied = Command::new("cp")
        .args(["-a", "/usr/lib/systemd/system"])
        .arg(&units)
        .status();
    assert!(copied.unwrap().success());
    let verified = Command::new("systemd-analyze")
        .arg(format!("--root={}", root.display()))
        .args(["--man=no", "verify", "forkvol.service"])
        .output()
        .unwrap();
    let said = well(&verified);
    assert!(!said.contains("forkvol.service:"), "{said}");
}

#[test]
fn the_settings_that_are_installed_are_right_with_and_without_their_comments() {
    let settings = fs::read_to_string(scripts().join("systemd/config.toml")).unwrap();
    let live: String = settings
        .lines()
        .map(|line| {
            line.strip_prefix("# ")
                .filter(|l| l.contains(" = ") || l.starts_with("[["))
                .unwrap_or(line)
                .to_owned()
                + "\n"
        })
        .collect();
    for text in [settings.clone(), live] {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("forkvol")).unwrap();
        fs::write(dir.path().join("forkvol/config.toml"), &text).unwrap();
        let checked = Command::new(env!("CARGO_BIN_EXE_forkvol"))
            .args(["config", "check"])
            .env("XDG_CONFIG_HOME", dir.path())
            .env("FORKVOL_STORE", dir.path())
            .output()
            .unwrap();
        well(&checked);
    }
}

/// The shell block of the guide that begins with this line.
fn guide(first: &str) -> String {
    let path = root().join("docs/guide.md");
    let text = fs::read_to_string(path).unwrap();
    let block = text.split("```sh\n").find(|block| block.starts_with(first));
    block.unwrap().split("```").next().unwrap().to_owned()
}

#[test]
fn the_guide_s_blocks_for_any_host_do_what_it_says() {
    let dir = tempfile::tempdir().unwrap();
    let (before, after) = (guide("# before"), guide("# after"));
    let job = |work: &str, status: &str| {
        let script = format!(
            "set -euo pipefail; sleep 60 & RUNNER_PID=$!; JOB=$RANDOM-$RANDOM; trap 'kill $RUNNER_PID' EXIT
             echo 1 >package-lock.json
             {before}
             {work}
             STATUS={status}
             {after}"
        );
        let output = Command::new("bash")
            .args(["-c", &script])
            .env("PATH", path_variable())
            .env("HOME", dir.path())
            .env("FORKVOL_STORE", dir.path().join("store"))
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        well(&output)
    };
    job(
        "[[ $FORKVOL_HIT == empty ]]; echo warm >node_modules/f; echo npm >~/.npm/f",
        "0",
    );
    job(
        "[[ $FORKVOL_HIT == exact ]]; echo lost >node_modules/f",
        "1",
    );
    job(
        "[[ $(cat node_modules/f ~/.npm/f) == 'warm'$'\\n''npm' ]]",
        "0",
    );
    let stop = Command::new(env!("CARGO_BIN_EXE_forkvol"))
        .args(["daemon", "stop"])
        .env("FORKVOL_STORE", dir.path().join("store"))
        .output()
        .unwrap();
    well(&stop);
}
