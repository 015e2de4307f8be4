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
