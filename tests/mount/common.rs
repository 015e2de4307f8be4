//! A store, its engine and a mounted fork, without a daemon.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use forkvol::engine::{Code, CommitRequest, Engine, EngineConfig, ForkRequest, Owner, Served};
use forkvol::store::{ForkId, Verdict};
use forkvol::sys::mount;

pub fn wait_for(mut is_done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is_done() {
        assert!(Instant::now() < end, "waited for a minute");
        thread::sleep(Duration::from_millis(1));
    }
}

pub struct TestStore {
    dir: tempfile::TempDir,
    pub engine: Arc<Engine>,
}

/// A mounted fork; unmounted when dropped, whatever happened.
pub struct TestMount {
    pub id: ForkId,
    pub path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Drop for TestMount {
    fn drop(&mut self) {
        // Gone already after a commit.
        if mount::device_at(&self.path).is_ok() {
            mount::detach_abort(&self.path).unwrap_or_default();
        }
    }
}

impl TestStore {
    pub fn new() -> TestStore {
        TestStore::of(tempfile::tempdir().unwrap())
    }

    fn of(dir: tempfile::TempDir) -> TestStore {
        let open = || {
            let config = EngineConfig {
                reserve: Some(0),
                ..EngineConfig::default()
            };
            Engine::open(&dir.path().join("store"), config)
        };
        let mut opened = open();
        // Threads of sessions that have ended may not have.
        wait_for(|| {
            let is_busy = matches!(&opened, Err(error) if error.code == Code::Busy);
            if is_busy {
                opened = open();
            }
            !is_busy
        });
        let engine = opened.unwrap();
        TestStore { dir, engine }
    }

    /// The same store, opened anew.
    pub fn reopened(self) -> TestStore {
        let TestStore { dir, engine } = self;
        engine.shutdown(true).unwrap();
        drop(engine);
        TestStore::of(dir)
    }

    pub fn dir(&self) -> PathBuf {
        self.dir.path().join("store")
    }

    pub fn fork(&self, volume: &str) -> TestMount {
        self.fork_with(volume, |_| {})
    }

    pub fn fork_with(&self, volume: &str, change: impl FnOnce(&mut ForkRequest)) -> TestMount {
        let id = self.make(volume, change);
        self.mount(id)
    }

    /// A fork that is not mounted yet.
    pub fn fork_only(&self, volume: &str) -> ForkId {
        self.make(volume, |_| {})
    }

    fn make(&self, volume: &str, change: impl FnOnce(&mut ForkRequest)) -> ForkId {
        let mut request = ForkRequest {
            volume: volume.into(),
            from: None,
            parents: Vec::new(),
            read_only: false,
            ephemeral: false,
            size: 4 << 30,
            labels: BTreeMap::new(),
            excludes: Vec::new(),
            default_excludes: false,
            import: false,
            owner: Owner::Keep,
            acl: false,
            suid: true,
            dev: true,
            job: None,
            uid_map: None,
            verdict: Verdict::Off,
            scope: String::new(),
            uid: 0,
            gid: 0,
            asker: Weak::new(),
        };
        change(&mut request);
        self.engine.fork(request).unwrap().id.parse().unwrap()
    }

    pub fn mount(&self, id: ForkId) -> TestMount {
        self.mount_folder(id, "")
    }

    /// Mounts one folder of a fork, which is made if it is missing.
    pub fn mount_folder(&self, id: ForkId, folder: &str) -> TestMount {
        let mounted = self.try_mount_folder(id, folder).unwrap();
        assert!(std::fs::metadata(&mounted.path).is_ok());
        mounted
    }

    pub fn try_mount_folder(&self, id: ForkId, folder: &str) -> Result<TestMount, String> {
        self.serve(id, folder, false)
    }

    /// Mounts a fork in the place of a mount that was taken away and lives on out of sight.
    pub fn mount_instead(&self, id: ForkId) -> TestMount {
        self.serve(id, "", true).unwrap()
    }

    fn serve(&self, id: ForkId, folder: &str, instead: bool) -> Result<TestMount, String> {
        let fork = self.engine.find_fork(&id.to_string());
        let read_only = fork.map_err(|error| error.to_string())?.read_only;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        std::fs::create_dir(&path).unwrap();
        let fuse = mount::open_fuse().expect("these tests need /dev/fuse");
        let options = mount::Options {
            source: "forkvol:test".into(),
            read_only,
            suid: true,
            dev: true,
            allow_other: true,
        };
        mount::mount_fuse(&fuse, &path, &options).expect("these tests need root");
        let dev = mount::device_number(mount::device_at(&path).unwrap());
        let served = Served {
            folder: folder.into(),
            mountpoint: path.clone().into(),
            dev,
            created: false,
            namespace: None,
            instead,
            owner: (0, 0),
        };
        let result = self.engine.serve(id, fuse.into(), &served);
        let mounted = TestMount {
            id,
            path,
            _dir: dir,
        };
        result.map_err(|error| error.to_string())?;
        Ok(mounted)
    }

    /// Waits until the daemon has seen that no mount of a fork is left.
    pub fn wait_unmounted(&self, id: ForkId) {
        let state = || self.engine.find_fork(&id.to_string()).unwrap().state;
        while state() != "unmounted" {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    /// Commits and takes the mount away; returns the number of the new version.
    pub fn commit(&self, mount: TestMount) -> Option<u64> {
        let version = self.commit_as(&mount, false);
        drop(mount);
        version
    }

    pub fn commit_as(&self, mount: &TestMount, keep: bool) -> Option<u64> {
        let request = CommitRequest {
            keep,
            labels: BTreeMap::new(),
            message: None,
            if_head: None,
            if_base: false,
            force: false,
            when: Default::default(),
        };
        let mut done = self.engine.commit(vec![mount.id], request).unwrap();
        done.remove(0).version.map(|version| version.number)
    }

    pub fn check(&self) {
        let report = self.engine.check().unwrap();
        assert!(report.problems.is_empty(), "{:?}", report.problems);
    }
}

/// Runs a shell script in a folder and returns what it prints.
pub fn sh(dir: &Path, script: &str) -> String {
    let output = std::process::Command::new("bash")
        .args(["-euo", "pipefail", "-c", script])
        .current_dir(dir)
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{script}\n{}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

/// Xorshift: the same numbers for the same seed, which is not 0.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % below
    }
}
