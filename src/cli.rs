//! The command line: what it accepts, and which part of it answers.

mod caches;
mod client;
mod config;
mod content;
mod contradictions;
mod daemon;
mod doctor;
mod ending;
mod exit;
mod facts;
mod forks;
mod holders;
mod job;
mod late;
mod mounting;
mod output;
mod paths;
mod place;
mod run;
mod values;
mod volumes;

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use serde_json::json;

use client::Client;
use config::Config;
use late::Late;
use place::Place;
use values::Busy;

use crate::protocol::{Code, Failure, Owner, Request, VERSION};
use crate::sys::process;

/// Forkable cache volumes for CI jobs: private, writable forks of a committed version, mounted through FUSE.
#[derive(Debug, Parser)]
#[command(
    name = "forkvol",
    version,
    infer_subcommands = false,
    after_help = exit::STATUSES
)]
struct Cli {
    /// The store's folder (default: the service's, else your own)
    #[arg(long, global = true, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Print one JSON document
    #[arg(long, global = true)]
    json: bool,
    /// Say nothing but errors
    #[arg(long, short, global = true)]
    quiet: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a command with forks in place, and commit them if it succeeds
    Run(Late<run::Run>),
    /// Start a job: fork its volumes and put them in place, until finish
    Attach(Late<job::Attach>),
    /// End a job: commit its volumes, or abandon them
    Finish(Late<job::Finish>),
    /// Show the jobs that are attached
    Jobs,
    /// Show which caches a folder's tools have, as a .forkvol.yml
    Detect {
        #[arg(default_value = ".", value_parser = values::path())]
        dir: PathBuf,
    },
    /// Fork a volume and mount it
    Fork(Late<NewFork>),
    /// Make a fork's content the volume's new head
    Commit(Late<CommitOptions>),
    /// Mount a fork again that has lost its mount
    Mount {
        fork: OsString,
        #[arg(value_parser = values::path())]
        mountpoint: Option<PathBuf>,
    },
    /// Drop what forks have changed, and unmount them
    Abandon(AbandonOptions),
    /// List the volumes
    Volumes,
    /// Look at one volume, or change it
    Volume {
        #[command(subcommand)]
        command: VolumeCommand,
    },
    /// List the forks
    Forks,
    /// List a volume's versions, newest first
    Log {
        #[arg(value_parser = values::volume)]
        volume: String,
    },
    /// Show what differs between two versions, or a version and a fork
    Diff {
        /// A version, or a fork: its id or a path inside its mount
        a: OsString,
        /// Likewise
        b: OsString,
        /// Only count
        #[arg(long)]
        stat: bool,
    },
    /// Make an older version the head again
    Rollback {
        #[arg(value_parser = values::volume)]
        volume: String,
        version: String,
    },
    /// Keep a version from being removed
    Pin { version: String },
    /// Let a version be removed again
    Unpin { version: String },
    /// Write a version as a tar file
    Export {
        version: String,
        /// Where to; - is standard output. A name that ends in .zst is compressed
        #[arg(long, short, default_value = "-")]
        output: PathBuf,
    },
    /// Make a version of a tar file, which may be compressed with zstd
    Import {
        #[arg(value_parser = values::volume)]
        volume: String,
        /// - is standard input
        file: PathBuf,
    },
    /// Print a file of a version
    Cat {
        #[arg(value_name = "VERSION:PATH")]
        file: OsString,
    },
    /// List a folder of a version
    Ls {
        #[arg(value_name = "VERSION[:PATH]")]
        folder: OsString,
    },
    /// Show what the store holds
    Stats {
        /// In the text format of Prometheus
        #[arg(long)]
        prometheus: bool,
    },
    /// Give back the room of what no version needs
    Gc {
        /// Only say what would go
        #[arg(long)]
        dry_run: bool,
        /// Compress everything once more, and well, which takes long and goes by itself after a day
        #[arg(long, conflicts_with = "dry_run")]
        settle: bool,
    },
    /// Verify everything the store holds
    Check {
        /// Set damaged versions aside and make the newest whole one the head
        #[arg(long)]
        repair: bool,
        /// Remove the damaged versions that no fork is made from
        #[arg(long, requires = "repair")]
        yes: bool,
    },
    /// Examine the machine and the set-up
    Doctor {
        /// Mend what can be mended without touching the kernel
        #[arg(long, value_name = "WHAT", num_args = 0..=1, require_equals = true)]
        fix: Option<Option<String>>,
    },
    /// Run, start or end the daemon of a store
    Daemon {
        #[command(subcommand)]
        command: daemon::DaemonCommand,
    },
    /// Show the settings in force and where they come from
    Config {
        #[command(subcommand)]
        command: Option<ConfigCommand>,
    },
    /// Show the version
    Version,
    /// Print completions for a shell
    Completions { shell: clap_complete::Shell },
    /// Write the manual pages into a folder
    Man { dir: PathBuf },
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Only say whether the configuration is right
    Check,
}

#[derive(Debug, Subcommand)]
enum VolumeCommand {
    /// Show a volume
    Show {
        #[arg(value_parser = values::volume)]
        name: String,
    },
    /// Remove a volume and all its versions
    Rm {
        #[arg(value_parser = values::volume)]
        name: String,
        /// Even with live forks, which are abandoned, and pinned versions
        #[arg(long)]
        force: bool,
    },
    /// Give a volume another name
    Rename {
        #[arg(value_parser = values::volume)]
        old: String,
        #[arg(value_parser = values::volume)]
        new: String,
    },
    /// Let the next fork start empty
    Reset {
        #[arg(value_parser = values::volume)]
        name: String,
    },
}

#[derive(Clone, Debug, Args)]
struct NewFork {
    #[arg(value_parser = values::volume)]
    volume: String,
    #[arg(value_parser = values::path())]
    mountpoint: PathBuf,
    #[command(flatten)]
    options: ForkOptions,
}

/// How a fork is made.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Fork options")]
struct ForkOptions {
    /// The version to fork, of any volume (default: head)
    #[arg(long, value_name = "VERSION")]
    from: Option<String>,
    /// Fork this where the volume has no version; may be repeated, the first that exists is taken
    #[arg(long, value_name = "VERSION", conflicts_with = "from")]
    parent: Vec<String>,
    /// Refuse all writes
    #[arg(long)]
    read_only: bool,
    /// Never commit
    #[arg(long)]
    ephemeral: bool,
    /// Room for new data (default: 20g)
    #[arg(long, value_parser = values::room)]
    size: Option<u64>,
    /// Recorded at commit
    #[arg(long, value_name = "K=V", value_parser = values::label)]
    label: Vec<(String, String)>,
    /// As --label, one a line
    #[arg(long, value_name = "FILE")]
    label_file: Vec<PathBuf>,
    /// Record the hash of a file, as a label with the file's name
    #[arg(long, value_name = "FILE")]
    lock_file: Vec<PathBuf>,
    /// Leave paths out of commits
    #[arg(long, value_name = "PATTERN")]
    exclude: Vec<String>,
    /// Do not leave out what is left out by default
    #[arg(long)]
    no_default_exclude: bool,
    /// Whose the files appear to be: UID or UID:GID, caller, or keep
    #[arg(long, value_parser = values::owner, default_value = "keep")]
    owner: Owner,
    /// Take POSIX ACLs
    #[arg(long)]
    acl: bool,
    /// Honour setuid and setgid bits (root, in a store that root alone may use)
    #[arg(long)]
    suid: bool,
    /// Honour device files (root, in a store that root alone may use)
    #[arg(long)]
    dev: bool,
    /// Fail where the cache fails
    #[arg(long)]
    strict: bool,
    /// The job is for a change from outside (default: from the variables of the CI host); believed only from agents
    #[arg(long, value_name = "BOOL")]
    foreign: Option<bool>,
    /// The job's branch or tag is protected (default: likewise); believed only from agents
    #[arg(long, value_name = "BOOL")]
    protected: Option<bool>,
    /// What its volumes are called by where it is not trusted (default: likewise); believed only from agents
    #[arg(long, value_name = "NAME")]
    scope: Option<String>,
}

#[derive(Clone, Debug, Args)]
struct CommitOptions {
    /// An id (f-...) or a path inside the mount
    fork: OsString,
    /// Commit the state as of now; the fork stays mounted
    #[arg(long)]
    keep: bool,
    /// Recorded with the version
    #[arg(long, value_name = "K=V", value_parser = values::label)]
    label: Vec<(String, String)>,
    /// Recorded with the version
    #[arg(short, long, value_parser = values::message)]
    message: Option<String>,
    /// Only if this is still the head
    #[arg(long, value_name = "VERSION", conflicts_with = "if_base")]
    if_head: Option<String>,
    /// Only if the head is still what the fork was made from
    #[arg(long)]
    if_base: bool,
    /// Even if what it was made from has been taken back
    #[arg(long)]
    force: bool,
    /// What to do about a mount in use: detach, fail or wait=DURATION
    #[arg(long, value_parser = values::busy, default_value = "detach")]
    busy: Busy,
}

#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = false)]
struct AbandonOptions {
    /// An id (f-...) or a path inside the mount
    fork: Option<OsString>,
    /// Those that were made for jobs and are mounted nowhere; what was forked by hand stays
    #[arg(long)]
    orphans: bool,
    /// All of the store
    #[arg(long)]
    all: bool,
}

/// What every command has at hand.
#[derive(Clone, Debug)]
struct Context {
    json: bool,
    config: Config,
    place: Place,
}

impl Context {
    fn connect(&self) -> Result<Client, Failure> {
        Client::connect_or_start(&self.place)
    }

    /// Asks one thing of the daemon.
    fn ask(&self, request: &Request) -> Result<serde_json::Value, Failure> {
        self.connect()?.call(request)
    }
}

/// Parses the arguments of this process, does what they say, and returns its exit status.
pub fn main() -> u8 {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    // Before the command's own arguments begin.
    let own = arguments.iter().skip(1).take_while(|a| *a != "--");
    let json = own.clone().any(|a| a == "--json");
    match parse(&arguments) {
        Ok((cli, matches)) => dispatch(cli, &matches),
        Err(error) => misused(
            &error,
            subcommand(own).is_some_and(|name| name == "run"),
            json,
        ),
    }
}

/// The first word that is no option, nor the value of one.
fn subcommand<'a>(mut own: impl Iterator<Item = &'a OsString>) -> Option<&'a OsString> {
    loop {
        let word = own.next()?;
        if word == "--store" {
            own.next();
        } else if !word.as_encoded_bytes().starts_with(b"-") {
            return Some(word);
        }
    }
}

fn parse(arguments: &[OsString]) -> Result<(Cli, ArgMatches), clap::Error> {
    // Help of help is help.
    let is_help = arguments.get(1).is_some_and(|word| word == "help");
    let wanted = |word: &&OsString| !is_help || (*word != "--help" && *word != "-h");
    let matches = Cli::command().try_get_matches_from(arguments.iter().filter(wanted))?;
    let cli = Cli::from_arg_matches(&matches)?;
    contradictions::refuse(&cli, &matches)
        .map_err(|what| Cli::command().error(ErrorKind::ArgumentConflict, what))?;
    Ok((cli, matches))
}

/// Help and version go to standard output; a mistake is one line like every other error.
fn misused(error: &clap::Error, is_run: bool, json: bool) -> u8 {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            process::default_sigpipe();
            let printed = output::print(error.to_string().as_bytes());
            printed.map_or_else(|failure| exit::report(&failure, 1, json, None), |()| 0)
        }
        kind => {
            let text = error.to_string();
            let mut lines = text
                .lines()
                .map(str::trim)
                .take_while(|l| !l.starts_with("Usage:"));
            let first = lines
                .next()
                .unwrap_or_default()
                .trim_start_matches("error: ")
                .to_owned();
            let first = first.trim_end_matches(':');
            let rest: Vec<&str> = lines
                .filter(|l| !l.is_empty() && !l.starts_with("For more information"))
                .collect();
            let message = match kind {
                ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                    "a command is missing".into()
                }
                _ if rest.is_empty() => first.into(),
                _ => format!("{first}: {}", rest.join(", ")),
            };
            let message = output::elided(message);
            let failure = Failure::new(Code::Usage, message).hint("see forkvol --help");
            exit::report(&failure, before(is_run, &failure), json, None)
        }
    }
}

/// The status of a failure before a command has begun its work.
fn before(is_run: bool, failure: &Failure) -> u8 {
    match is_run {
        true => exit::RUN_FAILED,
        false => exit::status(failure.code),
    }
}

fn dispatch(cli: Cli, matches: &ArgMatches) -> u8 {
    if cli.quiet {
        output::be_quiet();
    }
    let json = cli.json;
    let is_run = matches!(cli.command, Command::Run(_));
    let context = Config::load().and_then(|config| {
        let place = Place::find(cli.store.as_deref(), &config)?;
        Ok(Context {
            json,
            config,
            place,
        })
    });
    let context = match context {
        Ok(context) => context,
        Err(failure) => return exit::report(&failure, before(is_run, &failure), json, None),
    };
    // A reader that has seen enough is no error, but a daemon must survive its readers.
    if !is_run && !matches!(cli.command, Command::Daemon { .. }) {
        process::default_sigpipe();
    }
    let done = match cli.command {
        Command::Run(run) => {
            return run::run(
                &context,
                run.into_inner(),
                matches.subcommand_matches("run"),
            );
        }
        Command::Attach(attach) => job::attach(
            &context,
            attach.into_inner(),
            matches.subcommand_matches("attach"),
        ),
        command => execute(&context, command),
    };
    match done {
        Ok(()) => 0,
        Err(failure) => {
            let status = exit::status(failure.code);
            exit::report(&failure, status, json, Some(&context.place))
        }
    }
}

fn execute(context: &Context, command: Command) -> Result<(), Failure> {
    match command {
        Command::Run(_) | Command::Attach(_) => Err(Failure::new(
            Code::Usage,
            "this command is answered elsewhere",
        )),
        Command::Finish(options) => job::finish(context, &options),
        Command::Jobs => job::jobs(context),
        Command::Detect { dir } => caches::detect(context.json, &dir),
        Command::Fork(fork) => forks::fork(context, &fork),
        Command::Commit(options) => forks::commit(context, &options),
        Command::Mount { fork, mountpoint } => forks::mount(context, &fork, mountpoint.as_deref()),
        Command::Abandon(options) => forks::abandon(context, &options),
        Command::Forks => forks::list(context),
        Command::Volumes => volumes::list(context),
        Command::Volume { command } => volumes::volume(context, command),
        Command::Log { volume } => volumes::log(context, volume),
        Command::Diff { a, b, stat } => volumes::diff(context, &a, &b, stat),
        Command::Rollback { volume, version } => volumes::rollback(context, volume, version),
        Command::Pin { version } => volumes::pin(context, version, true),
        Command::Unpin { version } => volumes::pin(context, version, false),
        Command::Export { version, output } => content::export(context, version, &output),
        Command::Import { volume, file } => content::import(context, volume, &file),
        Command::Cat { file } => content::cat(context, &file),
        Command::Ls { folder } => content::ls(context, &folder),
        Command::Stats { prometheus } => volumes::stats(context, prometheus),
        Command::Gc { dry_run, settle } => volumes::gc(context, dry_run, settle),
        Command::Check { repair, yes } => volumes::check(context, repair, yes),
        Command::Doctor { fix } => doctor::doctor(context, fix),
        Command::Daemon { command } => daemon::daemon(context, command),
        Command::Config { command } => settings(context, command.as_ref()),
        Command::Version => {
            let document = json!({"version": VERSION, "protocol": crate::protocol::PROTOCOL});
            output::show(context.json, &document, |_| format!("forkvol {VERSION}\n"))
        }
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "forkvol", &mut text);
            output::print(&text)
        }
        Command::Man { dir } => std::fs::create_dir_all(&dir)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), &dir))
            .map_err(|e| {
                let message = format!("cannot write manual pages to {}: {e}", dir.display());
                Failure::new(Code::Failed, message)
            }),
    }
}

/// `config`: each value and where it came from.
fn settings(context: &Context, command: Option<&ConfigCommand>) -> Result<(), Failure> {
    let Context { config, place, .. } = context;
    if matches!(command, Some(ConfigCommand::Check)) {
        let file = config
            .file
            .as_ref()
            .map_or("no file".into(), |f| f.display().to_string());
        let document = json!({"file": config.file.as_deref().map(output::path), "ok": true});
        return output::show(context.json, &document, |_| format!("{file}: ok\n"));
    }
    let rows: Vec<_> = config
        .table()
        .into_iter()
        .map(|(name, value, origin)| match (name, place) {
            ("store", Place::Embedded { store, named_by }) if *named_by != place::CONFIGURED => {
                json!({"name": name, "value": output::path(store), "origin": named_by})
            }
            ("store", Place::Service) => {
                json!({"name": name, "value": place::SERVICE_SOCKET, "origin": "the service"})
            }
            _ => json!({"name": name, "value": value, "origin": origin}),
        })
        .collect();
    let document = json!({"file": config.file.as_deref().map(output::path), "settings": rows});
    output::show(context.json, &document, |_| {
        let written = |row: &serde_json::Value| {
            let name = row["name"].as_str().unwrap_or_default();
            let value = config::as_written(name, &row["value"]);
            json!({"name": name, "value": value, "origin": row["origin"]})
        };
        let rows: Vec<_> = rows.iter().map(written).collect();
        output::table(
            &rows,
            &[
                ("NAME", "/name", output::Shown::Plain),
                ("VALUE", "/value", output::Shown::Plain),
                ("ORIGIN", "/origin", output::Shown::Plain),
            ],
        )
    })
}

/// A duration as the protocol has it.
fn as_seconds(duration: Option<Duration>) -> Option<f64> {
    duration.map(|d| d.as_secs_f64())
}

#[cfg(test)]
mod tests;
