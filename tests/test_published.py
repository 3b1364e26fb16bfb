"""Recipes of published datasets: small files in the published formats, and the entries that they must give, by hand."""

import csv
import json
from pathlib import Path

import av
import numpy as np
import pytest

from vmm.__main__ import main
from vmm.data.media import decode
from vmm.data.sources import SOURCES, open_source
from vmm.data.sources.entry import REASONS, Entry
from vmm.errors import UserError

ESC10 = Path(__file__).parent.parent.parent / "shared" / "data" / "esc10"


def lay(folder: Path, files: dict[str, str | object]) -> Path:
    """Writes text files (JSON from what is no text); names of media get empty files: sources open none."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def read(kind: str, path: Path, **options) -> list[Entry]:
    """The entries as `vmm data build` gets them."""
    entries = list(open_source(path, kind, options)[1])
    assert {entry.reason for entry in entries} <= {None, *REASONS}
    return entries


def good(entries: list[Entry], folder: Path) -> list[tuple]:
    """(id, path from the folder, start, end, captions, labels) of the clips."""
    return [
        (e.id, str(Path(e.path).relative_to(folder)), e.start, e.end, e.captions, e.labels)
        for e in entries if not e.reason
    ]  # fmt: skip


def lost(entries: list[Entry]) -> list[tuple]:
    return [(entry.id, entry.reason) for entry in entries if entry.reason]


KINETICS = """label,youtube_id,time_start,time_end,split,is_cc
testifying,---QUuC4vJs,84,94,train,0
"petting animal (not cat)",-0001abcdEF,3,13,train,0
dancing,raw_video01,100,110,train,0
dancing,gone_video1,0,10,train,0
dancing,bad_span_01,20,10,train,0
dancing,too_short
yoga,other_split,5,15,val,0
"""


@pytest.fixture
def kinetics(tmp_path) -> Path:
    return lay(tmp_path, {
        "train.csv": KINETICS,
        "videos/testifying/---QUuC4vJs_000084_000094.mp4": "",
        "videos/petting_animal_(not_cat)/-0001abcdEF_000003_000013.mkv": "",
        "videos/-0001abcdEF.mp4": "",
        "videos/raw_video01.webm": "",
        "videos/other_split_000005_000015.mp4": "",
        "videos/gone_video1_000000_000010.mp4.part": "",
        "videos/._gone_video1_000000_000010.mp4": "",
    })  # fmt: skip


def test_kinetics_takes_clips_whole_and_spans_of_whole_videos(kinetics):
    entries = read("kinetics", kinetics / "train.csv", media=kinetics / "videos", split="train")
    assert good(entries, kinetics / "videos") == [
        ("---QUuC4vJs_000084_000094", "testifying/---QUuC4vJs_000084_000094.mp4", None, None, (), {"class": "testifying"}),
        (
            "-0001abcdEF_000003_000013", "petting_animal_(not_cat)/-0001abcdEF_000003_000013.mkv", None, None, (),
            {"class": "petting animal (not cat)"},
        ),
        ("raw_video01_000100_000110", "raw_video01.webm", 100.0, 110.0, (), {"class": "dancing"}),
    ]  # fmt: skip
    assert lost(entries) == [("gone_video1_000000_000010", "missing"), ("line 6", "bad span"), ("line 7", "bad line")]
    missing, span, line = (entry for entry in entries if entry.reason)
    assert missing.detail == f"no file gone_video1_000000_000010.* or gone_video1.* below {kinetics / 'videos'}"
    assert (missing.start, missing.end) == (0.0, 10.0)
    assert span.detail.startswith("end 10 is not after start 20: dancing, bad_span_01, 20, 10")
    assert "2 fields, not 6" in line.detail


def test_kinetics_options(kinetics):
    everything = read("kinetics", kinetics / "train.csv", label="action")
    assert good(everything, kinetics)[-1][0] == "other_split_000005_000015"
    assert good(everything, kinetics)[-1][5] == {"action": "yoga"}
    cut = read("kinetics", kinetics / "train.csv", clips=True)
    assert [(e.start, e.end) for e in cut if e.id.startswith("raw_video01")] == [(None, None)]
    with pytest.raises(UserError, match="has no split 'validate'; known: train, val"):
        read("kinetics", kinetics / "train.csv", split="validate")


def test_kinetics_test_set_has_no_labels(tmp_path):
    lay(tmp_path, {"test.csv": "youtube_id,time_start,time_end,split\nabcdefghijk,1,11,test\n", "abcdefghijk.mp4": ""})
    assert good(read("kinetics", tmp_path / "test.csv"), tmp_path) == [
        ("abcdefghijk_000001_000011", "abcdefghijk.mp4", 1.0, 11.0, (), {})
    ]


def test_a_stray_quote_costs_its_own_line(tmp_path):
    text = "label,youtube_id,time_start,time_end,split\n"
    text += '"yoga,aaaaaaaaaaa,0,10,train\nyoga,bbbbbbbbbbb,0,10,train\nyo"ga,ccccccccccc,0,10,train\nyoga,ddddddddddd,0,10,train\n'
    lay(tmp_path, {"train.csv": text} | {f"{letter * 11}.mp4": "" for letter in "abcd"})
    entries = read("kinetics", tmp_path / "train.csv")
    assert [entry.path[-8:-4] for entry in entries if not entry.reason] == ["bbbb", "cccc", "dddd"]
    assert lost(entries) == [("line 2", "bad line")]


def test_links_are_followed_once(tmp_path):
    lay(tmp_path, {
        "here/train.csv": "label,youtube_id,time_start,time_end,split\nyoga,aaaaaaaaaaa,0,10,train\n",
        "there/deep/aaaaaaaaaaa.mp4": "",
    })  # fmt: skip
    (tmp_path / "here" / "videos").symlink_to(tmp_path / "there")
    (tmp_path / "there" / "round").symlink_to(tmp_path / "here")
    (entry,) = read("kinetics", tmp_path / "here" / "train.csv")
    assert entry.path == str(tmp_path / "here" / "videos" / "deep" / "aaaaaaaaaaa.mp4")


SOMETHING = [
    {
        "id": "78687", "label": "holding potato next to vicks vaporub bottle",
        "template": "Holding [something] next to [something]", "placeholders": ["potato", "vicks vaporub bottle"],
    },
    {"id": "42326", "label": "showing a cup", "template": "Showing [something]", "placeholders": ["a cup"]},
    {"id": "10", "label": "x", "template": "Juggling [something]", "placeholders": ["x"]},
    {"label": "no id"},
    "no object",
]  # fmt: skip
SOMETHING_CLASSES = {"Holding something next to something": "0", "Showing something": "1"}


def test_something_something_v2(tmp_path):
    lay(tmp_path, {
        "labels/train.json": SOMETHING, "labels/labels.json": SOMETHING_CLASSES,
        "20bn-something-something-v2/78687.webm": "", "20bn-something-something-v2/10.webm": "",
    })  # fmt: skip
    entries = read("something_something_v2", tmp_path / "labels" / "train.json", media=tmp_path)
    assert good(entries, tmp_path) == [(
        "78687", "20bn-something-something-v2/78687.webm", None, None, ("holding potato next to vicks vaporub bottle",),
        {"class": "Holding something next to something"},
    )]  # fmt: skip
    assert lost(entries) == [
        ("42326", "missing"),
        ("item 3", "bad line"),
        ("item 4", "bad line"),
        ("item 5", "bad line"),
    ]
    assert "'Juggling something' is not in labels.json" in entries[2].detail


def test_something_something_v2_test_answers(tmp_path):
    lay(
        tmp_path,
        {"test.json": [{"id": "1"}, {"id": "2"}], "labels.json": SOMETHING_CLASSES, "1.webm": "", "2.webm": ""},
    )
    with pytest.raises(UserError, match=r"test-answers.csv: no such file; .* in the labels archive"):
        read("something_something_v2", tmp_path / "test.json")
    lay(tmp_path, {"test-answers.csv": "1;Showing something\n"})
    entries = read("something_something_v2", tmp_path / "test.json")
    assert good(entries, tmp_path) == [("1", "1.webm", None, None, (), {"class": "Showing something"})]
    assert lost(entries) == [("item 2", "bad line")]
    (tmp_path / "labels.json").unlink()
    with pytest.raises(UserError, match="labels.json: no such file; .* in the labels archive"):
        read("something_something_v2", tmp_path / "test.json")


def test_ucf101(tmp_path):
    lay(tmp_path, {
        "ucfTrainTestlist/classInd.txt": "1 ApplyEyeMakeup\n2 HandstandPushups\n",
        "ucfTrainTestlist/trainlist02.txt":
            "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\r\nHandstandPushups/v_HandStandPushups_g08_c01.avi 2\r\n"
            "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c02.avi 2\r\nApplyEyeMakeup/v_ApplyEyeMakeup_g08_c03.avi 1\r\n",
        "ucfTrainTestlist/testlist02.txt": "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\nJuggling/v_Juggling_g01_c01.avi\n",
        "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi": "",
        "UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.mp4": "",
        "UCF-101/HandstandPushups/v_HandstandPushups_g08_c01.avi": "",
    })  # fmt: skip
    train = read("ucf101", tmp_path, split="train2")
    assert good(train, tmp_path / "UCF-101") == [
        (
            "v_ApplyEyeMakeup_g08_c01", "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", None, None, (),
            {"class": "ApplyEyeMakeup"},
        ),
        (
            "v_HandStandPushups_g08_c01", "HandstandPushups/v_HandstandPushups_g08_c01.avi", None, None, (),
            {"class": "HandstandPushups"},
        ),
    ]  # fmt: skip
    assert lost(train) == [("trainlist02.txt line 3", "bad line"), ("v_ApplyEyeMakeup_g08_c03", "missing")]
    test = read("ucf101", tmp_path / "ucfTrainTestlist", split="test2", media=tmp_path / "UCF-101")
    assert [entry[:2] for entry in good(test, tmp_path / "UCF-101")] == [
        ("v_ApplyEyeMakeup_g01_c01", "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.mp4")
    ]
    assert lost(test) == [("testlist02.txt line 2", "bad line")]
    with pytest.raises(UserError, match="--split is needed: known: test1, test2, test3, train1, train2, train3"):
        read("ucf101", tmp_path)
    with pytest.raises(UserError, match="--split train4: did you mean 'train"):
        read("ucf101", tmp_path, split="train4")
    with pytest.raises(UserError, match="trainlist01.txt: no such file; it comes in UCF101TrainTestSplits"):
        read("ucf101", tmp_path, split="train1")


def test_hmdb51(tmp_path):
    lay(tmp_path, {
        "testTrainMulti_7030_splits/wave_test_split1.txt": "hello_wave_u_cm_np1_fr_med_0.avi 2 \n",
        "testTrainMulti_7030_splits/brush_hair_test_split1.txt":
            "April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1 \nMay_brush_hair_1.avi 2 \nJune_brush_hair.avi 0 \n"
            "July_brush_hair.avi 1\nno index.avi\n",
        "testTrainMulti_7030_splits/brush_hair_test_split2.txt": "May_brush_hair_1.avi 1 \n",
        "hmdb51_org/brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi": "",
        "hmdb51_org/brush_hair/May_brush_hair_1.avi": "",
        "hmdb51_org/wave/hello_wave_u_cm_np1_fr_med_0.avi": "",
    })  # fmt: skip
    train = read("hmdb51", tmp_path, split="train1")
    assert good(train, tmp_path / "hmdb51_org") == [(
        "brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0", "brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi",
        None, None, (), {"class": "brush_hair"},
    )]  # fmt: skip
    assert lost(train) == [
        ("brush_hair/July_brush_hair", "missing"), ("brush_hair_test_split1.txt line 5", "bad line")
    ]  # fmt: skip
    test = read("hmdb51", tmp_path, split="test1")
    assert [(e[0], e[5]["class"]) for e in good(test, tmp_path)] == [
        ("brush_hair/May_brush_hair_1", "brush_hair"), ("wave/hello_wave_u_cm_np1_fr_med_0", "wave")
    ]  # fmt: skip
    with pytest.raises(UserError, match="_test_split3.txt: no such file, nor of another class"):
        read("hmdb51", tmp_path, split="test3")


CHARADES = '''id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length
46GP8,HR43,Kitchen,6,7,Yes,"A person, cooking.",food;stove,A person stirs.;"Someone ""cooks"".",c092 11.90 21.20;c147 0.00 12.60;c092 1.00 2.00,24.83
N11GT,0KZ7,Stairs,6,7,Yes,Quiet.,,"A person
sits.",,18.33
GONE1,0KZ7,Stairs,6,7,Yes,Quiet.,,,c147 0.00 5.00,18.33
BAD01,0KZ7,Stairs,6,7,Yes,Quiet.,,,c999 0.00 5.00,18.33
BAD02,0KZ7,Stairs
'''  # fmt: skip


def test_charades(tmp_path):
    lay(tmp_path, {
        "Charades/Charades_v1_train.csv": CHARADES.replace('"Someone ""cooks""."', "Someone cooks."),
        "Charades/Charades_v1_classes.txt": "c092 Watching/looking outside of a window\nc147 Someone is cooking something\n",
        "Charades_v1_480/46GP8.mp4": "", "Charades_v1_480/N11GT.mp4": "", "Charades_v1_480/BAD01.mp4": "",
    })  # fmt: skip
    entries = read("charades", tmp_path / "Charades" / "Charades_v1_train.csv", media=tmp_path)
    assert good(entries, tmp_path / "Charades_v1_480") == [
        (
            "46GP8", "46GP8.mp4", None, None, ("A person stirs.", "Someone cooks.", "A person, cooking."),
            {"class": ["Watching/looking outside of a window", "Someone is cooking something"]},
        ),
        ("N11GT", "N11GT.mp4", None, None, ("A person sits.", "Quiet."), {"class": []}),
    ]  # fmt: skip
    assert lost(entries) == [("GONE1", "missing"), ("line 6", "bad line"), ("line 7", "bad line")]
    (tmp_path / "Charades" / "Charades_v1_classes.txt").unlink()
    with pytest.raises(UserError, match="Charades_v1_classes.txt: no such file; .* in Charades.zip"):
        read("charades", tmp_path / "Charades" / "Charades_v1_train.csv", media=tmp_path)


AUDIOSET = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=5, num_segs=5, num_unique_labels=3, num_positive_labels=6
# YTID, start_seconds, end_seconds, positive_labels
--4gqARaEJE, 0.000, 10.000, "/m/068hy,/m/0jbk"
-0RWZT-miFs, 420.000, 430.000, "/m/03qtwd"
-panns_name, 30.000, 40.000, "/m/0jbk"
-msname_abc, 30.500, 40.500, "/m/0jbk"
-gone_video, 30.000, 40.000, "/m/0jbk"
-bad_label_, 30.000, 40.000, "/m/unknown"
-bad_line__, 30.000
"""


@pytest.fixture
def audioset(tmp_path) -> Path:
    return lay(tmp_path, {
        "eval_segments.csv": AUDIOSET,
        "class_labels_indices.csv":
            'index,mid,display_name\n0,/m/068hy,"Domestic animals, pets"\n1,/m/0jbk,"Animal"\n2,/m/03qtwd,"Crowing"\n',
        "wav/--4gqARaEJE.wav": "", "mp4/--4gqARaEJE.mp4": "", "wav/-0RWZT-miFs_000420.flac": "",
        "wav/Y-panns_name.wav": "", "wav/-msname_abc_30500_40500.m4a": "",
    })  # fmt: skip


def test_audioset(audioset):
    entries = read("audioset", audioset / "eval_segments.csv")
    assert good(entries, audioset) == [
        # A file with pictures goes before one with sound alone; a whole video gives its span.
        (
            "--4gqARaEJE_0", "mp4/--4gqARaEJE.mp4", 0.0, 10.0, (), {"class": ["Domestic animals, pets", "Animal"]},
        ),
        ("-0RWZT-miFs_420000", "wav/-0RWZT-miFs_000420.flac", None, None, (), {"class": ["Crowing"]}),
        ("-panns_name_30000", "wav/Y-panns_name.wav", None, None, (), {"class": ["Animal"]}),
        ("-msname_abc_30500", "wav/-msname_abc_30500_40500.m4a", None, None, (), {"class": ["Animal"]}),
    ]  # fmt: skip
    assert lost(entries) == [("-gone_video_30000", "missing"), ("line 9", "bad line"), ("line 10", "bad line")]
    (first, *_) = read("audioset", audioset / "eval_segments.csv", clips=True)
    assert (first.start, first.end) == (None, None)
    (audioset / "class_labels_indices.csv").unlink()
    with pytest.raises(UserError, match="class_labels_indices.csv: no such file; .* download page of AudioSet"):
        read("audioset", audioset / "eval_segments.csv")


def test_vggsound(tmp_path):
    lay(tmp_path, {
        "vggsound.csv":
            '---g-f_I2yQ,1,"people marching",test\n--0PQM4-hqg,30,waterfall burbling,train\n--56QUhyDQM,185,"playing tennis",train\n'
            '--5OkAjCI7g,40,"cat, purring",train\n--Xabcdefgh,forty,"cat purring",train\n',
        "video/---g-f_I2yQ_000001.mp4": "", "video/--0PQM4-hqg.mkv": "", "video/--5OkAjCI7g_40000_50000.wav": "",
    })  # fmt: skip
    entries = read("vggsound", tmp_path / "vggsound.csv", split="train")
    assert good(entries, tmp_path / "video") == [
        ("--0PQM4-hqg_000030", "--0PQM4-hqg.mkv", 30.0, 40.0, (), {"class": "waterfall burbling"}),
        ("--5OkAjCI7g_000040", "--5OkAjCI7g_40000_50000.wav", None, None, (), {"class": "cat, purring"}),
    ]
    assert lost(entries) == [("--56QUhyDQM_000185", "missing"), ("line 5", "bad line")]
    (test,) = read("vggsound", tmp_path / "vggsound.csv", split="test")
    assert (test.id, test.start, test.labels) == ("---g-f_I2yQ_000001", None, {"class": "people marching"})
    with pytest.raises(UserError, match="has no split 'val'; known: test, train"):
        read("vggsound", tmp_path / "vggsound.csv", split="val")


def test_ave(tmp_path):
    head = "Category&VideoID&Quality&StartTime&EndTime\n"
    lay(tmp_path, {
        "Annotations.txt": head + "Church bell&RUhOCu3LNXM&good&0&10\nChurch bell&VWi2ENBuTbw&good&0&0\n"
            "Male speech, man speaking&0giAfYq9oVM&good&3&9\nBark&gone_video1&good&1&4\nBark&RUhOCu3LNXM&good\n"
            "Bark&RUhOCu3LNXM&good&nan&4\n",
        "testSet.txt": "Male speech, man speaking&0giAfYq9oVM&good&3&9\n",
        "AVE/RUhOCu3LNXM.mp4": "", "AVE/VWi2ENBuTbw.mp4": "", "AVE/0giAfYq9oVM.mp4": "",
    })  # fmt: skip
    bell = ("RUhOCu3LNXM@0-10", "AVE/RUhOCu3LNXM.mp4", 0.0, 10.0, (), {"class": "Church bell"})
    speech = ("0giAfYq9oVM@3-9", "AVE/0giAfYq9oVM.mp4", 3.0, 9.0, (), {"class": "Male speech, man speaking"})
    entries = read("ave", tmp_path)
    assert good(entries, tmp_path) == [bell, speech]
    assert lost(entries) == [
        ("line 3", "bad span"),
        ("gone_video1@1-4", "missing"),
        ("line 6", "bad line"),
        ("line 7", "bad line"),
    ]
    assert good(read("ave", tmp_path, split="test"), tmp_path) == [speech]
    assert good(read("ave", tmp_path / "testSet.txt"), tmp_path) == [speech]
    with pytest.raises(UserError, match="--split validation: of a folder of AVE, known: test, train, val"):
        read("ave", tmp_path, split="validation")
    with pytest.raises(UserError, match="valSet.txt: no such file; it comes in AVE_Dataset.zip"):
        read("ave", tmp_path, split="val")


def test_esc50(tmp_path):
    lay(tmp_path, {
        "meta/esc50.csv": "filename,fold,target,category,esc10,src_file,take\n1-100032-A-0.wav,1,0,dog,True,100032,A\n"
            "2-100038-A-14.wav,2,14,chirping_birds,False,100038,A\n3-9-A-11.wav,3,11,sea_waves,True,9,A\n"
            "4-9-A-11.wav,six,11,sea_waves,True,9,A\n",
        "audio/1-100032-A-0.wav": "", "audio/2-100038-A-14.wav": "",
    })  # fmt: skip
    dog = ("1-100032-A-0", "audio/1-100032-A-0.wav", None, None, (), {"class": "dog"})
    birds = ("2-100038-A-14", "audio/2-100038-A-14.wav", None, None, (), {"class": "chirping_birds"})
    gone, bad = ("3-9-A-11", "missing"), ("line 5", "bad line")
    entries = read("esc50", tmp_path)
    assert (good(entries, tmp_path), lost(entries)) == ([dog, birds], [gone, bad])
    entries = read("esc50", tmp_path / "meta" / "esc50.csv", split="train1")
    assert (good(entries, tmp_path), lost(entries)) == ([birds], [gone, bad])
    entries = read("esc50", tmp_path, split="test1")
    assert (good(entries, tmp_path), lost(entries)) == ([dog], [bad])
    with pytest.raises(UserError, match="--split test6: did you mean 'test"):
        read("esc50", tmp_path, split="test6")


@pytest.mark.skipif(not ESC10.is_dir(), reason="the recordings of ESC-10 are not here")
def test_real_recordings_of_esc10(tmp_path):
    """The first distribution of these recordings: folders of classes, .ogg; with the table that came later."""
    with open(tmp_path / "esc50.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["filename", "fold", "target", "category", "esc10", "src_file", "take"])
        for path in sorted(ESC10.glob("*/*.ogg")):
            fold, source, take = path.stem.split("-")
            target, name = path.parent.name.split(" - ")
            table.writerow(
                [f"{path.stem}.wav", fold, int(target) - 1, name.lower().replace(" ", "_"), True, source, take]
            )
    entries = read("esc50", tmp_path / "esc50.csv", media=ESC10)
    assert len(entries) == 400 and not lost(entries)
    counts = {}
    for entry in entries:
        counts[entry.labels["class"]] = counts.get(entry.labels["class"], 0) + 1
        assert Path(entry.path).parent.name.split(" - ")[1].lower().replace(" ", "_") == entry.labels["class"]
    assert set(counts.values()) == {40} and len(counts) == 10 and "dog_bark" in counts
    test, train = (read("esc50", tmp_path / "esc50.csv", media=ESC10, split=split) for split in ("test3", "train3"))
    assert (len(test), len(train)) == (80, 320)
    assert {Path(entry.path).name[0] for entry in test} == {"3"}
    assert {entry.id for entry in test} | {entry.id for entry in train} == {entry.id for entry in entries}
    heard = decode(
        test[0].path, pick=lambda _: 0.0, seconds=4.0, frames=1, size=16, sample_rate=16000, want=("audio",)
    ).audio  # fmt: skip
    assert heard.shape == (64000,) and np.abs(heard).max() > 0.01
    # The same folder without a table.
    (kind, found, _) = open_source(ESC10, None, {"label": "class"})
    assert kind == "folder"
    found = list(found)
    taken = [entry for entry in found if not entry.reason]
    assert {(entry.path, entry.labels["class"].split(" - ")[1].lower().replace(" ", "_")) for entry in taken} == {
        (entry.path, entry.labels["class"]) for entry in entries
    }
    # What lies beside the recordings (a page of credits) is told of, not taken.
    assert {reason for _, reason in lost(found)} <= {"not taken"}


MSRVTT = {
    "info": {"year": "2016"},
    "videos": [
        {
            "video_id": "video0", "category": 9, "url": "https://www.youtube.com/watch?v=9lZi22qLlEo",
            "start time": 137.72, "end time": 149.44, "split": "train", "id": 0,
        },
        {
            "video_id": "video1", "category": 16, "url": "https://www.youtube.com/watch?v=w4JM08PDEng",
            "start time": 184.33, "end time": 195.0, "split": "train", "id": 1,
        },
        {"video_id": "video2", "category": 0, "url": "", "start time": 1, "end time": 2, "split": "train", "id": 2},
        {"video_id": "video3", "category": 20, "url": "", "start time": 1, "end time": 2, "split": "train", "id": 3},
        {"video_id": "video4", "category": 3, "url": "", "start time": 1, "end time": 2, "split": "validate", "id": 4},
    ],
    "sentences": [
        {"caption": "a car is shown", "video_id": "video0", "sen_id": 0},
        {"caption": "someone cooks", "video_id": "video1", "sen_id": 20},
        {"caption": "a car drives", "video_id": "video0", "sen_id": 1},
        {"caption": "of no video", "video_id": "video9999", "sen_id": 2},
    ],
}  # fmt: skip


def test_msrvtt(tmp_path):
    lay(tmp_path, {
        "train_val_videodatainfo.json": MSRVTT, "TrainValVideo/video0.mp4": "", "youtube/w4JM08PDEng.mp4": "",
        "TrainValVideo/video3.mp4": "", "TrainValVideo/video4.mp4": "",
    })  # fmt: skip
    entries = read("msrvtt", tmp_path / "train_val_videodatainfo.json", split="train")
    assert good(entries, tmp_path) == [
        (
            "video0", "TrainValVideo/video0.mp4", None, None, ("a car is shown", "a car drives"),
            {"class": "vehicles/autos"},
        ),
        ("video1", "youtube/w4JM08PDEng.mp4", 184.33, 195.0, ("someone cooks",), {"class": "food/drink"}),
    ]  # fmt: skip
    assert lost(entries) == [("video2", "missing"), ("video 3", "bad line"), ("sentence 3", "bad line")]
    validation = read("msrvtt", tmp_path / "train_val_videodatainfo.json", split="validate")
    assert [entry.id for entry in validation] == ["video4", "sentence 3"]


def test_activitynet_captions(tmp_path):
    lay(tmp_path, {
        "captions/val_1.json": {
            "v_QOlSCBRmfWY": {
                "duration": 82.73, "timestamps": [[0.83, 19.86], [17.37, 60.81], [60, 56], [float("nan"), 9]],
                "sentences": ["A young woman is seen standing in a room.  ", " She dances.", "She stops.", "Who knows when."],
            },
            "v_bXdq2zI1Ms0": {"duration": 73.1, "timestamps": [[0, 10.23]], "sentences": ["Three men talk."]},
            "v_gone_video1": {"duration": 73.1, "timestamps": [[0, 10.23]], "sentences": ["Nobody is left."]},
            "v_uneven_list": {"duration": 73.1, "timestamps": [[0, 10.23]], "sentences": []},
        },
        "videos/v_QOlSCBRmfWY.mp4": "", "videos/bXdq2zI1Ms0.mkv": "",
    })  # fmt: skip
    entries = read("activitynet_captions", tmp_path / "captions" / "val_1.json", media=tmp_path / "videos")
    assert good(entries, tmp_path / "videos") == [
        (
            "v_QOlSCBRmfWY/0", "v_QOlSCBRmfWY.mp4", 0.83, 19.86, ("A young woman is seen standing in a room.",), {},
        ),
        ("v_QOlSCBRmfWY/1", "v_QOlSCBRmfWY.mp4", 17.37, 60.81, ("She dances.",), {}),
        ("v_bXdq2zI1Ms0/0", "bXdq2zI1Ms0.mkv", 0.0, 10.23, ("Three men talk.",), {}),
    ]  # fmt: skip
    assert lost(entries) == [
        ("v_QOlSCBRmfWY/2", "bad span"), ("v_QOlSCBRmfWY/3", "bad span"), ("v_gone_video1/0", "missing"), ("v_uneven_list", "bad line")
    ]  # fmt: skip
    with pytest.raises(UserError, match="--label: the source activitynet_captions has no such option"):
        read("activitynet_captions", tmp_path / "captions" / "val_1.json", label="class")


def youcook_video(subset: str, dish: str, *steps) -> dict:
    return {
        "duration": 241.62, "subset": subset, "recipe_type": dish, "video_url": "https://www.youtube.com/watch?v=x",
        "annotations": [{"segment": list(span), "id": number, "sentence": text} for number, span, text in steps],
    }  # fmt: skip


def test_youcook2(tmp_path):
    lay(tmp_path, {
        "youcookii_annotations_trainval.json": {"database": {
            "GLd3aX16zBg": youcook_video(
                "training", "113", (0, (90, 102), "spread margarine on two slices of bread"), (1, (114, 127), "fry"),
                (2, (130, 129), "serve"),
            ),
            "gone_video1": youcook_video("training", "113", (0, (1, 2), "gone")),
            "wrong_dish1": youcook_video("training", "999", (0, (1, 2), "odd")),
            "no_list_at_": {"subset": "training", "recipe_type": "113"},
            "fn9anlEL4FI": youcook_video("validation", "226", (0, (10, 20), "boil rice")),
        }},
        "label_foodtype.csv": "226,bibimbap\n113,grilled cheese\n",
        "raw_videos/training/113/GLd3aX16zBg.mkv": "", "raw_videos/validation/226/fn9anlEL4FI.webm": "",
    })  # fmt: skip
    path = tmp_path / "youcookii_annotations_trainval.json"
    entries = read("youcook2", path, split="training")
    video = "raw_videos/training/113/GLd3aX16zBg.mkv"
    assert good(entries, tmp_path) == [
        (
            "GLd3aX16zBg/0", video, 90.0, 102.0, ("spread margarine on two slices of bread",),
            {"class": "grilled cheese"},
        ),
        ("GLd3aX16zBg/1", video, 114.0, 127.0, ("fry",), {"class": "grilled cheese"}),
    ]  # fmt: skip
    assert lost(entries) == [
        ("GLd3aX16zBg annotation 2", "bad span"), ("gone_video1/0", "missing"),
        ("wrong_dish1 annotation 0", "bad line"), ("no_list_at_", "bad line"),
    ]  # fmt: skip
    (step,) = read("youcook2", path, split="validation")
    assert (step.id, step.labels) == ("fn9anlEL4FI/0", {"class": "bibimbap"})
    with pytest.raises(UserError, match="has no split 'test'; known: training, validation"):
        read("youcook2", path, split="test")
    (tmp_path / "label_foodtype.csv").unlink()
    with pytest.raises(UserError, match="label_foodtype.csv: no such file; .* download page of YouCook2"):
        read("youcook2", path)


OTHER = {
    "kinetics": ("a,b\n1,2\n", "no column 'youtube_id'; its first line must name youtube_id, time_start, time_end"),
    "charades": ("a,b\n1,2\n", "no column 'id'; its first line must name id, script, descriptions, actions"),
    "audioset": (
        "a,b\n1,2\n",
        "not AudioSet segments `YTID, start_seconds, end_seconds, positive_labels` .line 1: 2 fields",
    ),
    "vggsound": ("a,b,c,d\n1,x,3,4\n", "not a VGGSound table `youtube_id,start_seconds,.*start is 'b', not seconds"),
    "ave": ("a,b\n1,2\n", "not an AVE table `Category&VideoID&Quality&StartTime&EndTime` .line 1: 1 fields, not 5"),
    "esc50": ("a,b\n1,2\n", "no column 'filename'; its first line must name filename, fold, category"),
    "something_something_v2": ('[{"a": 1}]', "not a list of Something-Something clips .item 1: no 'id'"),
    "msrvtt": ('{"videos": []}', "not the JSON of MSR-VTT: it has no list 'sentences'"),
    "activitynet_captions": (
        '{"a": {"b": 1}}',
        "not the JSON of ActivityNet Captions .a: its timestamps and sentences",
    ),
    "youcook2": ('{"a": 1}', "not the JSON of YouCook2: it has no table 'database'"),
}


@pytest.mark.parametrize("kind", OTHER)
def test_another_file_is_one_line_that_names_the_field(kind, tmp_path):
    text, message = OTHER[kind]
    lay(tmp_path, {
        "file": text, "x.mp4": "", "Charades_v1_classes.txt": "c000 x", "labels.json": {}, "test-answers.csv": "1;x",
        "class_labels_indices.csv": "index,mid,display_name\n0,/m/0,x\n", "label_foodtype.csv": "1,x",
    })  # fmt: skip
    with pytest.raises(UserError, match=message) as caught:
        read(kind, tmp_path / "file")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["something_something_v2", "msrvtt", "activitynet_captions", "youcook2"])
def test_what_is_not_json_is_said(kind, tmp_path):
    lay(tmp_path, {"file.json": "<!doctype html>", "x.mp4": ""})
    with pytest.raises(UserError, match="file.json: not JSON"):
        read(kind, tmp_path / "file.json")


def test_media_that_are_none_of_the_dataset(kinetics):
    lay(kinetics, {"other/Holiday.mp4": "", "empty/readme.txt": ""})
    with pytest.raises(UserError, match="has none of the 5 media that train.csv names; .* called like 'Holiday.mp4'"):
        read("kinetics", kinetics / "train.csv", media=kinetics / "other")
    with pytest.raises(UserError, match="empty: holds no media files; name the folder of the media with --media"):
        read("kinetics", kinetics / "train.csv", media=kinetics / "empty")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        read("kinetics", kinetics / "train.csv", media=kinetics / "nowhere")


def test_build_counts_what_is_missing(tmp_path, capsys):
    """From an annotation file to shards: a cut clip, the span of a whole video, and a clip that the user lacks."""
    lay(tmp_path, {"val.csv": "label,youtube_id,time_start,time_end,split\nyoga,cut_clip_01,7,8,val\n"
        "dancing,whole_video,1,2,val\ndancing,gone_video1,0,10,val\n", "videos/none.txt": ""})  # fmt: skip
    for name, seconds in (("cut_clip_01_000007_000008", 1), ("whole_video", 3)):
        with av.open(str(tmp_path / "videos" / f"{name}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width = stream.height = 32
            for number in range(10 * seconds):
                picture = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 8 * number, np.uint8), format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode(None))
    arguments = [
        "data",
        "build",
        str(tmp_path / "val.csv"),
        str(tmp_path / "out"),
        "--kind",
        "kinetics",
        "--workers",
        "1",
    ]
    arguments += ["--media", str(tmp_path / "videos"), "--split", "val"]
    assert main([*arguments, "--budget", "0.5"]) == 0
    assert "2 clips in 1 shards; left out: 1 missing" in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["cut_clip_01_000007_000008", "whole_video_000001_000002"]
    assert [row["labels"] for row in rows] == [{"class": 1}, {"class": 0}]
    assert [(row["source"]["start"], row["source"]["end"]) for row in rows] == [(None, None), (1.0, 2.0)]
    assert [row["media"]["frames"] for row in rows] == [10, 10]
    (line,) = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "gone_video1_000000_000010" and json.loads(line)["reason"] == "missing"
    assert main(arguments) == 3  # above the usual budget
    assert "1 missing" in capsys.readouterr().err


def test_vmm_data_sources_tells_the_layouts(capsys):
    assert main(["data", "sources"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[: len(SOURCES)]] == list(SOURCES)
    assert all(len(line.split()) > 3 for line in lines)
    assert main(["data", "sources", "youcook2"]) == 0
    told = capsys.readouterr().out
    for word in (
        "--kind youcook2",
        "youcookii_annotations_trainval.json",
        '"recipe_type"',
        "label_foodtype.csv",
        "--split",
    ):
        assert word in told
    assert main(["data", "sources", "youcook"]) == 2
    assert "did you mean 'youcook2'" in capsys.readouterr().err


PUBLISHED = [name for name in SOURCES if name not in ("folder", "csv", "jsonl", "webdataset", "tfds")]


def test_every_recipe_says_its_files_and_options():
    import inspect

    assert len(PUBLISHED) == 12
    for name in PUBLISHED:
        text = inspect.getdoc(SOURCES[name])
        assert "SOURCE is" in text and "\nid: " in text, name
        for option in inspect.signature(SOURCES[name]).parameters:
            word = {"path": "SOURCE", "label": "labels: {class: "}.get(option, f"--{option}")
            assert word in text, f"{name} says nothing of {word}"
