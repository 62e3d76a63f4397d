# Copyright 2026 The TeleFLM authors
#
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Three pools of conversations, and seven kinds of noise to plant among them.

Real ones, where they lie beside the checkout; English ones, the documentation of functions of installed packages; and
Chinese ones, composed of phrases about a dozen subjects, since no installed package has Chinese prose.
"""

import ast
import base64
import gzip
import importlib.util
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.conversations import POOL

from .conftest import chat

Messages = list[dict[str, str]]
ENGLISH_PACKAGES = ("numpy", "scipy", "sklearn", "transformers")
PLANTED = 0.01  # of the pool, of each kind


# --- pools ------------------------------------------------------------------------------------------------------------


def real_pool(rows: int) -> list[Messages] | None:
    """Some of the real conversations, or None where they are absent."""
    if not POOL.exists():
        return None
    with gzip.open(POOL, "rt", encoding="utf-8") as lines:
        found = [json.loads(line)["messages"] for line in lines]
    return random.Random(0).sample(found, rows)


def english_pool(rows: int) -> list[Messages]:
    """What installed packages say of their functions and classes."""
    found: dict[str, Messages] = {}
    for package in ENGLISH_PACKAGES:
        spec = importlib.util.find_spec(package)
        folder = Path(spec.origin).parent if spec and spec.origin else None
        taken = 0
        for file in sorted(folder.rglob("*.py")) if folder else ():
            if "tests" in file.parts or taken >= rows // len(ENGLISH_PACKAGES):
                continue
            for node in ast.walk(ast.parse(file.read_bytes())):
                text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef) else None
                if text and len(text) > 150 and text not in found:
                    found[text] = chat(f"What does {node.name} of {package} do?", text[:1500])
                    taken += 1
    conversations = list(found.values())
    random.Random(0).shuffle(conversations)
    return conversations[:rows]


_SUBJECTS = {
    "烹饪": "米饭 豆腐 青菜 鸡蛋 面条 排骨 鲫鱼 香菇 土豆 茄子 酱油 生姜 大蒜 砂锅 蒸笼 案板 火候 调料",
    "历史": "唐朝 宋代 丝绸之路 科举 长城 运河 诸侯 皇帝 史官 变法 起义 都城 典籍 驿站 边疆 青铜器 竹简 朝贡",
    "天文": "恒星 行星 银河 黑洞 望远镜 彗星 光年 卫星 月食 引力 星云 轨道 陨石 太阳风 红移 脉冲星 星座 日冕",
    "医学": "血压 心脏 疫苗 抗生素 骨折 糖尿病 肺炎 过敏 睡眠 关节 胃炎 近视 免疫 手术 体温 贫血 肝脏 护士",
    "编程": "函数 变量 循环 数组 指针 编译器 数据库 接口 线程 缓存 递归 测试 类型 内存 日志 队列 哈希表 版本控制",
    "法律": "合同 法院 证据 原告 被告 律师 赔偿 诉讼 商标 继承 租赁 仲裁 刑法 判决 抵押 担保 劳动法 上诉",
    "音乐": "钢琴 二胡 节拍 和弦 旋律 交响曲 指挥 歌剧 民谣 鼓点 音阶 合唱 琵琶 小提琴 录音 乐谱 爵士 低音",
    "农业": "水稻 小麦 灌溉 化肥 虫害 温室 果树 土壤 播种 收割 拖拉机 玉米 牧场 蜂蜜 茶园 嫁接 轮作 种子",
    "经济": "通货膨胀 利率 股票 税收 出口 就业 汇率 银行 预算 债券 供给 需求 补贴 关税 消费 投资 储蓄 市场",
    "旅行": "机票 酒店 签证 行李 地图 海滩 古镇 火车站 导游 雪山 博物馆 民宿 护照 夜市 渡轮 登山 沙漠 寺庙",
    "体育": "篮球 足球 马拉松 游泳 裁判 教练 冠军 热身 乒乓球 体操 跳远 射门 发球 耐力 联赛 滑雪 羽毛球 起跑",
    "教育": "课堂 作业 考试 老师 学生 教材 奖学金 实验室 图书馆 论文 辅导 幼儿园 家长会 操场 毕业 校园 讲座 学费",
}
_FRAMES = (
    "首先要弄清{0}和{1}之间的关系",
    "很多人以为{0}决定一切，其实{1}更要紧",
    "如果{0}出了问题，先检查{1}",
    "{0}往往随着{1}而变化",
    "建议每天记录一次{0}，再与{1}比较",
    "初学者容易忽略{0}",
    "有经验的人会把{0}放在{1}之前",
    "从长远看，{0}能够改善{1}",
    "关于{0}，目前还没有统一的看法",
    "只要{0}准备充分，{1}就不难处理",
    "不妨用{0}来代替{1}",
    "过去二十年里{0}发生了很大变化",
    "请注意{0}的质量，它直接影响{1}",
    "最后把{0}整理好，留给下一次使用",
    "研究表明{0}与{1}密切相关",
    "在南方，{0}比{1}更常见",
    "遇到{0}时不要着急，慢慢观察{1}",
    "专家认为应当减少对{0}的依赖",
    "{0}的价格取决于{1}",
    "有条件的话，可以请人帮忙照看{0}",
)
_QUESTIONS = (
    "请介绍一下{0}和{1}。",
    "为什么{0}会影响{1}？",
    "怎样才能学好{0}？",
    "{0}与{1}有什么不同？",
    "关于{0}，你有什么建议？",
)


def chinese_pool(rows: int) -> list[Messages]:
    """Two to eight clauses about a subject each."""
    draw, made = random.Random(0), []
    for _ in range(rows):
        words = _SUBJECTS[draw.choice(list(_SUBJECTS))].split()
        clauses = [frame.format(*draw.sample(words, 2)) for frame in draw.sample(_FRAMES, draw.randint(2, 8))]
        made.append(chat(draw.choice(_QUESTIONS).format(*draw.sample(words, 2)), "；".join(clauses) + "。"))
    return made


# --- noise ------------------------------------------------------------------------------------------------------------


def _word_salad(answer: str, pool: Sequence[Messages], draw: random.Random) -> str:
    """As long as the answer, of pieces from all over the pool: words, or pairs of characters where there are none."""
    pieces = []
    while sum(map(len, pieces)) < len(answer):
        text = draw.choice(pool)[-1]["content"]
        if text.isascii():
            pieces.append(draw.choice(text.split() or [""]) + " ")
        else:
            place = draw.randrange(len(text))
            pieces.append(text[place : place + 2])
        pieces.append(" " * (not pieces[-1]))
    return "".join(pieces)


def _base64(answer: str, pool: Sequence[Messages], draw: random.Random) -> str:
    return base64.b64encode(draw.randbytes(max(30, len(answer.encode()) * 3 // 4))).decode()


def _keyboard_mash(answer: str, pool: Sequence[Messages], draw: random.Random) -> str:
    return "".join(draw.choices("asdfghjkl;qwertyuiopzxcvbnm  ", k=max(40, len(answer))))


def _mojibake(answer: str, pool: Sequence[Messages], draw: random.Random) -> str:
    """UTF-8 that was read as Latin-1; where that would leave most of it alone, UTF-16 of the other byte order."""
    if sum(map(str.isascii, answer)) > len(answer) / 2:
        return answer.encode("utf-16-le", "replace").decode("utf-16-be", "replace")
    return answer.encode().decode("latin-1")


def _of_another_row(answer: str, pool: Sequence[Messages], draw: random.Random) -> str:
    return draw.choice(pool)[-1]["content"]


def _repeated_token(answer: str, pool: Sequence[Messages], draw: random.Random) -> str:
    word = draw.choice(answer.split() if answer.isascii() else list(answer))
    return (word + " " * answer.isascii()) * max(20, len(answer) // (len(word) + 1))


def _truncated(answer: str, pool: Sequence[Messages], draw: random.Random) -> str:
    return answer[: max(1, int(len(answer) * draw.uniform(0.2, 0.7)))]


NOISE: dict[str, Callable[[str, Sequence[Messages], random.Random], str]] = {
    "word salad": _word_salad,
    "base64": _base64,
    "keyboard mash": _keyboard_mash,
    "mojibake": _mojibake,
    "answer of another row": _of_another_row,
    "repeated token": _repeated_token,
    "truncated answer": _truncated,
}
_ALL_MESSAGES = ("word salad", "base64", "keyboard mash", "mojibake")  # questions too; of the others the last answer


def plant(pool: Sequence[Messages], seed: int) -> tuple[list[Messages], list[str]]:
    """Damage [`PLANTED`] of the rows in each of the ways of [`NOISE`].

    Returns:
        the rows, and for each the kind of its noise, or "".
    """
    draw, rows, kinds = random.Random(seed), list(pool), [""] * len(pool)
    each = round(PLANTED * len(pool))
    places = iter(draw.sample(range(len(pool)), each * len(NOISE)))
    for kind, damage in NOISE.items():
        for place in (next(places) for _ in range(each)):
            messages = pool[place]
            first = 0 if kind in _ALL_MESSAGES else len(messages) - 1
            damaged = [{**message, "content": damage(message["content"], pool, draw)} for message in messages[first:]]
            rows[place] = [*messages[:first], *damaged]
            kinds[place] = kind
    return rows, kinds


__all__ = ["NOISE", "PLANTED", "chinese_pool", "english_pool", "plant", "real_pool"]
