"""Template sentences per emotion, everyday Mandarin of 6 to 14 characters, as a clip of 1 to 3 s can hold."""

import itertools

import numpy as np

SLOTS = {
    "人": ("妈妈", "爸爸", "老师", "小王", "你们", "孩子", "老板", "朋友"),
    "事": ("考试", "工作", "比赛", "会议", "生日", "手术", "旅行", "项目"),
    "时": ("今天", "昨天", "刚才", "明天", "这次", "晚上"),
}
TEMPLATES = {
    "neutral": (
        "{时}{人}去开会", "{人}在看书", "我把{事}的资料放在桌上", "{时}下午三点开始{事}", "请把门关一下",
        "{人}坐地铁上班", "{事}安排在{时}", "我们先吃饭吧", "这个表格在第二页", "{人}说{时}见面",
    ),
    "anger": (
        "我真的很生气", "{人}太过分了", "你给我滚出去", "闭嘴别再说了", "{事}搞成这样真可恶", "{人}凭什么骂我",
        "我受不了{人}了", "{人}就是个骗子", "我恨透了这个{事}", "{时}的事让我愤怒",
    ),
    "happiness": (
        "{时}我特别开心", "太好了{事}成功了", "{人}让我很高兴", "我太喜欢这个{事}了", "哈哈真是太棒了",
        "恭喜你{事}顺利", "{时}真幸福", "谢谢{人}我很感动", "能见到{人}真快乐", "这个{事}真好玩我爱它",
    ),
    "sadness": (
        "{人}走了我很难过", "我心里好委屈", "{事}失败了真伤心", "我真的舍不得{人}", "{时}我哭了很久",
        "{人}让我失望", "我们分手了我心碎", "唉{事}又没通过", "他去世了我很悲伤", "一个人好孤独好难受",
    ),
    "worry": (
        "我很担心{人}", "{事}万一失败怎么办", "{时}的{事}让我紧张", "恐怕{人}出事了", "我怕来不及了",
        "{人}还没回来我着急", "我对{事}很焦虑", "糟了{事}要迟到", "这样做太危险了", "我不放心{人}一个人",
    ),
    "surprise": (
        "天哪{人}居然来了", "没想到{事}成了", "怎么可能是{人}", "哇真的假的", "我的天{时}就{事}",
        "{人}竟然会唱歌", "不会吧{时}取消{事}", "这太让我震惊了", "真的吗我好意外", "{人}吓了我一跳",
    ),
}


def draw(emotion: str, rng: np.random.Generator) -> str:
    """A sentence that expresses the emotion."""
    template = TEMPLATES[emotion][int(rng.integers(len(TEMPLATES[emotion])))]
    return template.format(**{slot: words[int(rng.integers(len(words)))] for slot, words in SLOTS.items()})


def sentences() -> list[str]:
    """Every sentence that can occur, in a fixed order: what the miniature tokenizer is trained on."""
    fillings = [dict(zip(SLOTS, words, strict=True)) for words in itertools.product(*SLOTS.values())]
    return list(dict.fromkeys(template.format(**filling) for template in itertools.chain(*TEMPLATES.values())
                              for filling in fillings))
