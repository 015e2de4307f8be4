//! A machine with a Buildkite agent, and its jobs.

use std::process::Child;
use std::time::Instant;

use serde_json::{Value, json};

use super::*;

/// A machine with an agent, a store and one pipeline.
pub struct Host {
    pub dir: tempfile::TempDir,
}

/// How a job is run.
#[derive(Clone)]
pub struct Job<'a> {
    pub id: &'a str,
    pub agent: &'a str,
    pub order: &'a str,
    pub command: &'a str,
    /// One for each use of the plugin.
    pub plugins: Vec<Value>,
    pub variables: Vec<(&'a str, String)>,
}

pub fn npm(more: &Value) -> Value {
    let mut options = json!({"volumes": [{"name": "npm", "paths": ["cache"]}]});
    for (key, value) in more.as_object().unwrap() {
        options[key] = value.clone();
    }
    options
}

impl<'a> Job<'a> {
    pub fn new(id: &'a str, command: &'a str) -> Job<'a> {
        Job {
            id,
            agent: "agent-1",
            order: "v3",
            command,
            plugins: vec![npm(&json!({}))],
            variables: Vec::new(),
        }
    }

    pub fn with(mut self, name: &'a str, value: impl Into<String>) -> Job<'a> {
        self.variables.push((name, value.into()));
        self
    }
}

/// A plugin's options as the agent turns them into variables.
fn flatten(prefix: &str, value: &Value, into: &mut Vec<String>) {
    match value {
        Value::Array(items) => {
            for (at, item) in items.iter().enumerate() {
                flatten(&format!("{prefix}_{at}"), item, into);
            }
        }
        Value::Object(fields) => {
            for (key, item) in fields {
                let key = key.to_uppercase().replace(['-', ' '], "_");
                flatten(&format!("{prefix}_{key}"), item, into);
            }
        }
        Value::String(text) => into.push(format!("{prefix}={text}")),
        other => into.push(format!("{prefix}={other}")),
    }
}

impl Host {
    pub fn new() -> Host {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("hooks")).unwrap();
        Host { dir }
    }

    /// With the agent's own hooks, as an owner links them.
    pub fn with_agent_hooks() -> Host {
        let host = Host::new();
        for name in ["agent-startup", "environment", "pre-command", "pre-exit"] {
            let hook = scripts().join("buildkite/agent-hooks").join(name);
            fs::copy(hook, host.path("hooks").join(name)).unwrap();
        }
        fs::copy(
            scripts().join("buildkite/lib.sh"),
            host.path("hooks/lib.sh"),
        )
        .unwrap();
        host
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn checkout(&self, agent: &str) -> PathBuf {
        self.path(&format!("builds/{agent}/acme/shop/checkout"))
    }

    /// As unlike any other as Buildkite's are.
    pub fn job_id(&self, id: &str) -> String {
        let name = self.dir.path().file_name().unwrap().to_str().unwrap();
        format!("{}-{id}", name.trim_start_matches('.'))
    }

    pub fn hook(&self, agent: &str, name: &str, script: &str) {
        let folder = self.checkout(agent).join(".buildkite/hooks");
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(name), script).unwrap();
    }

    pub fn start(&self, job: &Job) -> Child {
        let checkout = self.checkout(job.agent);
        fs::create_dir_all(&checkout).unwrap();
        for (at, options) in job.plugins.iter().enumerate() {
            let mut variables = vec![
                "BUILDKITE_PLUGIN_NAME=FORKVOL".to_owned(),
                format!("BUILDKITE_PLUGIN_CONFIGURATION={options}"),
            ];
            flatten("BUILDKITE_PLUGIN_FORKVOL", options, &mut variables);
            let file = checkout.join(format!("../env.{at}"));
            fs::write(file, variables.join("\0") + "\0").unwrap();
        }
        let plugin = scripts().join("buildkite");
        let mut command = Command::new(root().join("tests/hosts/buildkite-agent"));
        command
            .arg("start")
            .env("PATH", path_variable())
            .env("FORKVOL_STORE", self.path("store"))
            .env("XDG_CONFIG_HOME", self.path("config"))
            .env("HOST_ORDER", job.order)
            .env("HOST_HOOKS", self.path("hooks"))
            .env(
                "HOST_PLUGINS",
                vec![plugin.to_str().unwrap(); job.plugins.len()].join(" "),
            )
            .env("BUILDKITE_JOB_ID", self.job_id(job.id))
            .env("BUILDKITE_AGENT_NAME", job.agent)
            .env("BUILDKITE_ORGANIZATION_SLUG", "acme")
            .env("BUILDKITE_PIPELINE_SLUG", "shop")
            .env("BUILDKITE_BUILD_CHECKOUT_PATH", checkout)
            .env("BUILDKITE_COMMAND", job.command)
            .env("TMPDIR", self.dir.path())
            .current_dir(self.dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        for (name, value) in &job.variables {
            command.env(name, value);
        }
        command.spawn().unwrap()
    }

    /// Runs a job to its end; returns its status and its log.
    pub fn run(&self, job: &Job) -> (i32, String) {
        let output = self.start(job).wait_with_output().unwrap();
        let log = text(&output.stdout) + &text(&output.stderr);
        (output.status.code().unwrap(), log)
    }

    #[track_caller]
    pub fn passes(&self, job: &Job) -> String {
        let (status, log) = self.run(job);
        assert_eq!(status, 0, "{log}");
        log
    }

    pub fn forkvol(&self, args: &[&str]) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_forkvol"))
            .args(args)
            .env("FORKVOL_STORE", self.path("store"))
            .env("XDG_CONFIG_HOME", self.path("config"))
            .stdin(Stdio::null())
            .output()
            .unwrap();
        text(&output.stdout).trim().to_owned()
    }

    pub fn versions(&self, volume: &str) -> usize {
        let log: Value = serde_json::from_str(&self.forkvol(&["log", volume, "--json"])).unwrap();
        log["versions"].as_array().unwrap().len()
    }

    #[track_caller]
    pub fn nothing_is_left(&self) {
        assert_eq!(self.forkvol(&["forks"]), "");
        assert_eq!(self.forkvol(&["jobs"]), "");
    }

    pub fn wait_for(&self, file: &Path) {
        let begun = Instant::now();
        while !file.exists() {
            assert!(
                begun.elapsed().as_secs() < 60,
                "{} does not come",
                file.display()
            );
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.forkvol(&["abandon", "--all"]);
        self.forkvol(&["daemon", "stop", "--force"]);
    }
}
